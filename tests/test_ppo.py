"""PPO: its equations by hand, what an update sees, what truncation means, and that it learns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ppo_cartpole as ppo

# --- Generalised advantage estimation ---


def gae_by_sums(rewards, values, ended, gamma, gae_lambda):
    """A_t = sum of (gamma * lambda)^l * delta_t+l up to the end of the episode, one sum per time and environment."""
    advantages = np.zeros_like(rewards)
    steps, num_envs = rewards.shape
    for n in range(num_envs):
        for t in range(steps):
            for k in range(t, steps):
                next_value = 0.0 if ended[k, n] else values[k + 1, n]
                delta = rewards[k, n] + gamma * next_value - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if ended[k, n]:
                    break
    return advantages


@pytest.mark.parametrize("end_rate", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("gamma, gae_lambda", [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_sums_of_its_definition(end_rate, gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(12, 3)), rng.normal(size=(13, 3))
    ended = rng.random((12, 3)) < end_rate
    advantages, returns = ppo.compute_gae(rewards, values, ended, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, gae_by_sums(rewards, values, ended, gamma, gae_lambda), atol=1e-12)
    np.testing.assert_allclose(returns, advantages + values[:-1], atol=1e-12)


# --- Losses ---


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([0.5, 0.9, 1.5, 1.5, 0.5])
    advantages = torch.tensor([1.0, -2.0, 1.0, -1.0, -1.0])
    # A gain is cut off at the clip range; a loss counts in full where the ratio made it worse.
    terms = [0.5, -1.8, 1.2, -1.5, -0.8]
    loss, approx_kl, clip_fraction = ppo.ppo_loss(ratio.log(), torch.zeros(5), advantages, 0.2)
    assert loss.item() == pytest.approx(-np.mean(terms), abs=1e-6)
    assert clip_fraction.item() == pytest.approx(4 / 5)
    assert approx_kl.item() == pytest.approx(np.mean([r - 1 - math.log(r) for r in ratio.tolist()]), abs=1e-6)


def test_no_gradient_beyond_the_clip_range():
    log_probs = torch.tensor([0.5, -0.5]).requires_grad_()  # ratios 1.65 and 0.61
    ppo.ppo_loss(log_probs, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)[0].backward()
    assert log_probs.grad.tolist() == [0.0, 0.0]


def test_value_losses_by_hand():
    values, old_values, returns = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 5.0]), torch.tensor([1.0, 3.0])
    assert ppo.value_loss(values, old_values, returns, None).item() == pytest.approx(0.5 * (0 + 4) / 2)
    # Clipped to 0.2 the first value is off by 0.8: the worse of the two errors counts.
    assert ppo.value_loss(values, old_values, returns, 0.2).item() == pytest.approx(0.5 * (0.64 + 4) / 2)


def test_log_probs_and_entropy_equal_those_of_a_distribution():
    logits, actions = torch.randn(6, 4), torch.randint(4, (6,))
    log_probs, entropy = ppo.log_probs_and_entropy(logits, actions)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_probs, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())


def test_actions_are_drawn_from_the_softmax():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    actions = ppo.sample_actions(probabilities.log().expand(20_000, 3))
    assert (torch.bincount(actions) / 20_000).tolist() == pytest.approx(probabilities.tolist(), abs=0.02)


def test_normalised_advantages():
    normalised = ppo.normalise(torch.tensor([1.0, 5.0, 9.0]))
    assert normalised.tolist() == pytest.approx([-1, 0, 1], abs=1e-5)


def test_explained_variance():
    returns = np.array([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(np.full(3, 9.0), returns) == pytest.approx(0.0)


# --- Training ---


def options(tmp_path, **changes):
    """A run of a few rollouts of 24 transitions, in 3 minibatches of 8."""
    flags = {"num_envs": 4, "num_steps": 6, "num_minibatches": 3, "update_epochs": 2, "total_timesteps": 72}
    quick = {"eval_every": 10**6, "eval_episodes": 1, "final_eval_episodes": 1, "hidden_size": 8}
    return ppo.Args(**{**flags, **quick, "run_dir": str(tmp_path / "run"), **changes})


def test_the_ratio_is_one_in_the_first_minibatch_of_a_rollout(tmp_path, monkeypatch):
    ratios, original = [], ppo.ppo_loss

    def spy(new_log_probs, old_log_probs, *rest):
        ratios.append((new_log_probs - old_log_probs).exp().detach())
        return original(new_log_probs, old_log_probs, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    ppo.train(options(tmp_path, learning_rate=0.1))
    updates = 3 * 2  # minibatches * epochs
    assert len(ratios) == 3 * updates
    for first in ratios[::updates]:
        torch.testing.assert_close(first, torch.ones(8), atol=1e-6, rtol=0)
    assert any((later - 1).abs().max() > 1e-3 for later in ratios[1::updates])


def test_every_sample_is_seen_once_per_epoch(tmp_path, monkeypatch):
    seen, original = [], ppo.log_probs_and_entropy

    def spy(logits, actions):
        seen.append(len(actions))
        return original(logits, actions)

    indices, randperm = [], torch.randperm

    def permutation(n):
        indices.append(randperm(n))
        return indices[-1]

    monkeypatch.setattr(ppo, "log_probs_and_entropy", spy)
    monkeypatch.setattr(torch, "randperm", permutation)
    result = ppo.train(options(tmp_path))
    assert result["gradient_steps"] == 3 * 2 * 3  # rollouts * epochs * minibatches
    assert seen == [24, 8, 8, 8, 8, 8, 8] * 3
    assert len(indices) == 6 and all(sorted(index.tolist()) == list(range(24)) for index in indices)
    assert any(index.tolist() != list(range(24)) for index in indices)


def test_the_entropy_bonus_raises_entropy(tmp_path):
    def final_entropy(coefficient, name):
        flags = {"env_id": "toy_envs:Terminated-v0", "learning_rate": 3e-2, "entropy_coef": coefficient}
        path = tmp_path / name
        ppo.train(options(path, total_timesteps=24 * 60, **flags))
        rows = (path / "run" / "progress.csv").read_text().splitlines()
        return float([row for row in rows if "train/entropy" in row][-1].split(",")[-1])

    # The reward grows with the action, so that without a bonus the policy settles on the last of five.
    assert final_entropy(10.0, "with") > 1.5 > 1.2 > final_entropy(0.0, "without")


def learned_value(tmp_path):
    args = options(
        tmp_path,
        env_id="toy_envs:Constant-v0",
        total_timesteps=24 * 60,
        gamma=0.9,
        gae_lambda=0.9,
        learning_rate=1e-2,
        update_epochs=8,
        hidden_size=16,
        max_grad_norm=10.0,
    )
    ppo.train(args)
    env = ppo.make_env(args)
    network = ppo.ActorCritic(env.observation_space, env.action_space, args)
    network.load_state_dict(ppo.load_checkpoint(tmp_path / "run" / "last.pt")["network"])
    return network.value(torch.ones(1, 1)).item()


def test_truncation_does_not_end_the_value(tmp_path):
    # Reward 1 for ever, in episodes that only the clock ends: V = 1 / (1 - 0.9) = 10.
    assert learned_value(tmp_path) == pytest.approx(10, abs=1)


def test_a_truncation_taken_for_an_end_would_show(tmp_path, monkeypatch):
    make_envs = ppo.make_envs

    def without_timeouts(args):
        envs = make_envs(args)
        step_wait = envs.step_wait

        def blind():
            obs, rewards, dones, infos = step_wait()
            return obs, rewards, dones, [{**info, "TimeLimit.truncated": False} for info in infos]

        envs.step_wait = blind
        return envs

    monkeypatch.setattr(ppo, "make_envs", without_timeouts)
    assert learned_value(tmp_path) < 6


def test_target_kl_ends_the_epochs_early(tmp_path):
    free = ppo.train(options(tmp_path / "free", learning_rate=0.1, update_epochs=10))
    held = ppo.train(options(tmp_path / "held", learning_rate=0.1, update_epochs=10, target_kl=1e-4))
    assert held["gradient_steps"] < free["gradient_steps"] / 2


def test_the_same_seed_gives_the_same_parameters_to_the_bit(tmp_path):
    def parameters(name, seed):
        ppo.train(options(tmp_path / name, seed=seed))
        network = ppo.load_checkpoint(tmp_path / name / "run" / "last.pt")["network"]
        return torch.cat([tensor.flatten() for tensor in network.values()])

    first = parameters("a", 1)
    assert torch.equal(first, parameters("b", 1)) and not torch.equal(first, parameters("c", 2))


def test_it_learns_cartpole(tmp_path):
    args = replace(options(tmp_path), num_envs=8, num_steps=32, num_minibatches=1, update_epochs=20, hidden_size=64)
    args = replace(args, total_timesteps=20_000, final_eval_episodes=20)
    result = ppo.train(args)
    assert result["final_return_mean"] > 150  # an untrained network stays near 10


def test_an_untrained_network_has_not_learned(tmp_path):
    args = replace(options(tmp_path), num_steps=9, update_epochs=1, total_timesteps=36, final_eval_episodes=20)
    assert ppo.train(args)["final_return_mean"] < 50


def test_a_norm_of_0_does_not_clip(tmp_path):
    def parameters(name, max_grad_norm):
        ppo.train(options(tmp_path / name, max_grad_norm=max_grad_norm))
        network = ppo.load_checkpoint(tmp_path / name / "run" / "last.pt")["network"]
        return torch.cat([tensor.flatten() for tensor in network.values()])

    assert torch.equal(parameters("off", 0.0), parameters("far", 1e9))
