"""Run a script of CleanRL's and print the seconds between two step counts; needs CleanRL's own interpreter.

python time_cleanrl.py FIRST LAST SCRIPT [flags of the script]
"""

import os
import runpy
import sys
import time

import gymnasium as gym

first, last = int(sys.argv[1]), int(sys.argv[2])
sys.argv = sys.argv[3:]
steps, started = 0, None
original = gym.vector.SyncVectorEnv.step


def step(self, actions):
    global steps, started
    steps += self.num_envs
    if started is None and steps >= first:
        started = (steps, time.perf_counter())
    elif steps >= last:
        print(f"SECONDS {time.perf_counter() - started[1]} STEPS {steps - started[0]}", flush=True)
        os._exit(0)
    return original(self, actions)


gym.vector.SyncVectorEnv.step = step
runpy.run_path(sys.argv[0], run_name="__main__")
