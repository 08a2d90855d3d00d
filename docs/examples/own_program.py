"""Train from a program of your own, and use the result."""

from dqn_vecenv import Args, train

if __name__ == "__main__":  # each worker process imports this file too
    result = train(Args(env_id="corridor:Corridor-v0", num_envs=2, total_timesteps=6_000, exploration_steps=2_000))
    print(f"return {result['final_return_mean']:.2f} at the end")
