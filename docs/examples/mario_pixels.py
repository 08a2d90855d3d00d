"""The first level of Super Mario Bros. as its picture, in the one form that dqn_atari.py reads: (84, 84), uint8."""

import gym_super_mario_bros  # noqa: F401  importing it registers its ids
import gymnasium as gym
from gymnasium.wrappers import GrayscaleObservation, MaxAndSkipObservation, ResizeObservation
from nes_py.wrappers import JoypadSpace


def make(**options):
    env = gym.make("SuperMarioBros-1-1-v0", **options)
    env = JoypadSpace(env, [["right"], ["right", "A"]])  # run, or run and jump
    env = MaxAndSkipObservation(env, skip=4)  # an action is held for 4 frames; their rewards are added
    env = GrayscaleObservation(env)  # (240, 256)
    return ResizeObservation(env, (84, 84))


gym.register("Mario-v0", entry_point=make, max_episode_steps=2_000)
