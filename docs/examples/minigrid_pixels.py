"""MiniGrid-Empty-Random-6x6-v0 as its picture, in the one form that dqn_atari.py reads: (84, 84), uint8."""

import gymnasium as gym
from gymnasium.wrappers import GrayscaleObservation, ResizeObservation
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper  # importing minigrid registers its ids


def make(**options):
    env = gym.make("MiniGrid-Empty-Random-6x6-v0", **options)
    env = RGBImgObsWrapper(env)  # a Dict; its "image" is the picture of the room, (48, 48, 3)
    env = ImgObsWrapper(env)  # that picture alone
    env = GrayscaleObservation(env)  # (48, 48)
    return ResizeObservation(env, (84, 84))


gym.register("EmptyRoomPixels-v0", entry_point=make)
