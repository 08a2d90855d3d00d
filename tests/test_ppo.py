"""PPO: its equations by hand, what an update sees, what truncation means, and that it learns."""

import itertools
import math

import numpy as np
import pytest
import torch
import toy_envs
from conftest import checkpoint_of, rows_of

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
    loss, log_ratio = ppo.ppo_loss(ratio.log() - 3, torch.full((5,), -3.0), advantages, 0.2)
    assert loss.item() == pytest.approx(-np.mean(terms), abs=1e-6)
    torch.testing.assert_close(log_ratio.exp(), ratio)


def test_approx_kl_by_hand_and_against_the_true_kl():
    ratio = [0.5, 0.9, 1.5]
    by_hand = np.mean([r - 1 - math.log(r) for r in ratio])
    assert ppo.approx_kl(torch.tensor(ratio).log()) == pytest.approx(by_hand, abs=1e-6)
    # Its mean under the old policy is the KL divergence itself.
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    torch.manual_seed(0)
    actions = torch.multinomial(old, 100_000, replacement=True)
    kl = (old * (old / new).log()).sum().item()
    assert ppo.approx_kl((new / old).log()[actions]) == pytest.approx(kl, rel=0.02)


def test_no_gradient_beyond_the_clip_range():
    log_probs = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()  # ratios 1.65 and 0.61
    ppo.ppo_loss(log_probs, torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.2)[0].backward()
    # The last two have become worse: there the gradient stays, -ratio * A / 4.
    assert log_probs.grad.tolist() == pytest.approx([0.0, 0.0, math.exp(0.5) / 4, -math.exp(-0.5) / 4])


def test_losses_refuse_to_broadcast():
    row, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(AssertionError):
        ppo.ppo_loss(row, row, column, 0.2)
    with pytest.raises(AssertionError):
        ppo.critic_loss(column, row)


def test_critic_loss_by_hand():
    values, returns = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0])
    assert ppo.critic_loss(values, returns).item() == pytest.approx(0.5 * (0 + 4) / 2)


def test_log_probs_and_entropy_equal_those_of_a_distribution():
    logits, actions = torch.randn(6, 4), torch.randint(4, (6,))
    log_probs, entropy = ppo.log_probs_and_entropy(logits, actions)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_probs, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())


def test_log_probs_and_entropy_of_continuous_actions_equal_those_of_a_distribution():
    means, log_stds, actions = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 3)
    log_probs, entropy = ppo.log_probs_and_entropy(torch.cat([means, log_stds], dim=1), actions)
    expected = torch.distributions.Independent(torch.distributions.Normal(means, log_stds.exp()), 1)
    torch.testing.assert_close(log_probs, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())


def test_actions_are_drawn_from_the_gaussian_and_greedy_ones_are_its_mean():
    policy = torch.tensor([[3.0, -1.0, math.log(0.5), math.log(2.0)]]).expand(50_000, 4)
    space = ppo.gym.spaces.Box(-1, 1, (2,))
    torch.manual_seed(0)
    drawn = ppo.choose_actions(policy, space)
    torch.testing.assert_close(drawn.mean(dim=0), torch.tensor([3.0, -1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), torch.tensor([0.5, 2.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.corrcoef(), torch.eye(2), atol=0.02, rtol=0)
    assert ppo.choose_actions(policy[:1], space, greedy=True).tolist() == [[3.0, -1.0]]


def test_actions_are_drawn_from_the_softmax_and_greedy_ones_are_its_largest():
    logits, discrete = torch.tensor([[0.0, 2.0, 1.0]]).expand(50_000, 3), ppo.gym.spaces.Discrete(3)
    torch.manual_seed(0)
    drawn = ppo.choose_actions(logits, discrete)
    torch.testing.assert_close(drawn.bincount() / 50_000, logits[0].softmax(dim=0), atol=0.01, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.multinomial(logits.softmax(dim=1), 1).squeeze(1))
    state = torch.get_rng_state()
    assert ppo.choose_actions(logits[:1], discrete, greedy=True).tolist() == [1]
    assert torch.equal(torch.get_rng_state(), state)  # an evaluation leaves the training as it is


def test_the_initial_policy_is_uniform_and_the_weights_are_orthogonal():
    env = ppo.make_env(ppo.Args())
    network = ppo.ActorCritic(env.observation_space, env.action_space, ppo.Args())
    for mlp, out_gain in ((network.actor, 0.01), (network.critic, 1.0)):
        layers = [layer for layer in mlp if isinstance(layer, torch.nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, out_gain), strict=True):
            weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5, rtol=1e-4)
            assert not layer.bias.any()
    assert set(network.actor.parameters()).isdisjoint(network.critic.parameters())
    obs = torch.randn(100, env.observation_space.shape[0])
    torch.testing.assert_close(network(obs).softmax(dim=1), torch.full((100, 2), 0.5), atol=0.03, rtol=0)
    assert network.value(obs).shape == (100,)


# --- Training ---


def options(tmp_path, **changes):
    """A run of a few rollouts of 24 transitions, in 3 minibatches of 8."""
    flags = {"num_envs": 4, "num_steps": 6, "num_minibatches": 3, "update_epochs": 2, "total_timesteps": 72}
    quick = {"eval_every": 10**6, "eval_episodes": 1, "final_eval_episodes": 1, "hidden_size": 8}
    return ppo.Args(**{**flags, **quick, "run_dir": str(tmp_path / "run"), **changes})


def test_continuous_actions_are_clipped_on_their_way_to_the_environment_only(tmp_path, monkeypatch):
    judged, original = [], ppo.log_probs_and_entropy
    monkeypatch.setattr(ppo, "log_probs_and_entropy", lambda p, actions: judged.append(actions) or original(p, actions))
    ppo.train(options(tmp_path, env_id="toy_envs:Target-v0"))  # the environment checks what it gets
    assert torch.cat(judged).abs().max() > 1.5
    network = checkpoint_of(tmp_path / "run")["network"]
    assert network["log_std"].shape == (2,) and network["log_std"].all()  # it was trained


def test_numbers_that_are_counted_are_no_continuous_actions(monkeypatch):
    monkeypatch.setattr(toy_envs.Target, "action_space", ppo.gym.spaces.Box(0, 9, (2,), np.int64))
    with pytest.raises(ppo.UsageError, match="1-D Box"):
        ppo.make_env(ppo.Args(env_id="toy_envs:Target-v0"))


def test_it_learns_continuous_actions(tmp_path):
    flags = {"total_timesteps": 12_000, "num_envs": 16, "num_steps": 32, "num_minibatches": 8, "update_epochs": 8}
    flags |= {"learning_rate": 3e-3, "hidden_size": 32, "final_eval_episodes": 50}
    result = ppo.train(options(tmp_path, env_id="toy_envs:Target-v0", **flags))
    assert result["final_return_mean"] > -0.02  # always in the middle: -0.2; the initial policy: -0.46
    log_std = checkpoint_of(tmp_path / "run")["network"]["log_std"]
    assert (log_std < -0.5).all(), log_std  # sure of itself


def test_the_ratio_is_one_in_the_first_minibatch_of_a_rollout(tmp_path, monkeypatch):
    ratios, original = [], ppo.ppo_loss

    def spy(log_probs, old_log_probs, *rest):
        assert log_probs.requires_grad and not old_log_probs.requires_grad
        ratios.append((log_probs - old_log_probs).exp().detach())
        return original(log_probs, old_log_probs, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    ppo.train(options(tmp_path, learning_rate=0.1))
    updates = 3 * 2  # minibatches * epochs
    assert len(ratios) == 3 * updates
    for first in ratios[::updates]:
        torch.testing.assert_close(first, torch.ones(8), atol=1e-6, rtol=0)
    assert any((later - 1).abs().max() > 1e-3 for later in ratios[1::updates])


def losses_seen(monkeypatch):
    """Return a list to which every minibatch appends what its losses were given, as {name: value}."""
    seen, policy_loss, critic_loss = [], ppo.ppo_loss, ppo.critic_loss

    def spy_on_policy(log_probs, old_log_probs, advantages, clip_coef):
        seen.append({"old_log_probs": old_log_probs, "advantages": advantages, "clip_coef": clip_coef})
        return policy_loss(log_probs, old_log_probs, advantages, clip_coef)

    def spy_on_value(values, returns):
        seen[-1] |= {"returns": returns}
        return critic_loss(values, returns)

    monkeypatch.setattr(ppo, "ppo_loss", spy_on_policy)
    monkeypatch.setattr(ppo, "critic_loss", spy_on_value)
    return seen


def test_every_sample_is_seen_once_per_epoch_and_its_columns_stay_together(tmp_path, monkeypatch):
    rollouts, compute_gae = [], ppo.compute_gae

    def spy(rewards, values, ended, *rest):
        advantages, returns = compute_gae(rewards, values, ended, *rest)
        rollouts.append(np.stack([advantages, returns], axis=-1).reshape(24, 2))
        return advantages, returns

    monkeypatch.setattr(ppo, "compute_gae", spy)
    seen = losses_seen(monkeypatch)
    result = ppo.train(options(tmp_path, norm_advantages=False))
    assert result["gradient_steps"] == len(seen) == 3 * 2 * 3  # rollouts * epochs * minibatches
    orders = []
    for epoch in range(6):
        minibatches = seen[3 * epoch : 3 * epoch + 3]
        rows = [torch.stack([m["advantages"], m["returns"]], dim=1) for m in minibatches]
        assert [len(row) for row in rows] == [8, 8, 8]
        orders.append([tuple(row) for row in torch.cat(rows).tolist()])
        assert sorted(orders[-1]) == sorted(tuple(row) for row in rollouts[epoch // 2].tolist())
        assert orders[-1] != [tuple(row) for row in rollouts[epoch // 2].tolist()]  # shuffled
    assert orders[0] != orders[1]  # and not the same way twice


@pytest.mark.parametrize("flag", [True, False])
def test_advantages_are_normalised_in_each_minibatch_or_not_at_all(tmp_path, monkeypatch, flag):
    seen = losses_seen(monkeypatch)
    ppo.train(options(tmp_path, norm_advantages=flag))
    normalised = [abs(m["advantages"].mean()) < 1e-5 and abs(m["advantages"].std() - 1) < 1e-3 for m in seen]
    assert all(normalised) if flag else not any(normalised)


@pytest.mark.parametrize("anneal_clip", [True, False])
def test_learning_rate_and_clip_fall_in_a_straight_line(tmp_path, monkeypatch, anneal_clip):
    seen = losses_seen(monkeypatch)
    steps, step = [], torch.optim.Adam.step

    def spy(optimizer, *rest):
        steps.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    ppo.train(options(tmp_path, total_timesteps=96, learning_rate=0.1, clip_coef=0.4, anneal_clip=anneal_clip))
    assert steps[::6] == pytest.approx([0.1, 0.075, 0.05, 0.025])  # a step size per rollout of 6 gradient steps
    expected = [0.4, 0.3, 0.2, 0.1] if anneal_clip else [0.4] * 4
    assert [m["clip_coef"] for m in seen[::6]] == pytest.approx(expected)


def test_a_rollout_goes_on_where_the_last_one_was_cut_off(tmp_path, monkeypatch):
    seen, compute_gae, value = [], ppo.compute_gae, ppo.ActorCritic.value

    def spy(network, obs):
        if obs.dim() == 3:
            seen.append(obs.clone())  # (T + 1, N, obs_dim)
        return value(network, obs)

    rewards = []
    monkeypatch.setattr(ppo.ActorCritic, "value", spy)
    monkeypatch.setattr(ppo, "compute_gae", lambda r, *rest: rewards.append(r.copy()) or compute_gae(r, *rest))
    ppo.train(options(tmp_path, env_id="toy_envs:Terminated-v0"))
    assert len(seen) == 3
    for before, after in itertools.pairwise(seen):
        assert torch.equal(before[-1], after[0])
    obs, reward = torch.cat([s[:-1] for s in seen] + [seen[-1][-1:]]), np.concatenate(rewards)
    _, episode, step, last_action = obs.unbind(dim=2)
    same = episode[1:] == episode[:-1]
    assert torch.equal(step[1:][same], step[:-1][same] + 1) and not step[1:][~same].any()
    # The reward of a step is the step plus half the action, which the next observation tells.
    np.testing.assert_array_equal(reward[same], (step[:-1] + last_action[1:] / 2)[same])


def test_a_timeout_adds_the_value_of_the_observation_that_it_cut_off(tmp_path, monkeypatch):
    # The value network here is the step that an observation tells: 4 where time runs out, 0 after the reset.
    rewards = []
    monkeypatch.setattr(ppo.ActorCritic, "value", lambda network, obs: obs[..., 2] + 0 * network.critic(obs)[..., 0])
    compute_gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda r, *rest: rewards.append(r.copy()) or compute_gae(r, *rest))
    make_envs = ppo.make_envs

    def recording(args):
        envs = make_envs(args)
        step_wait, envs.seen = envs.step_wait, []

        def spy():
            envs.seen.append(step_wait())
            return envs.seen[-1]

        envs.step_wait = spy
        made.append(envs)
        return envs

    made = []
    monkeypatch.setattr(ppo, "make_envs", recording)
    ppo.train(options(tmp_path, env_id="toy_envs:Mixed-v0", gamma=0.5))
    _, raw, dones, infos = zip(*made[0].seen, strict=True)
    truncated = np.array([[info["TimeLimit.truncated"] for info in row] for row in infos])
    assert truncated.any() and (np.array(dones) & ~truncated).any()  # both kinds of end are in it
    np.testing.assert_allclose(np.concatenate(rewards), np.array(raw) + 0.5 * 4 * truncated)


@pytest.mark.parametrize("num_minibatches", [24, 5, 48])
def test_minibatches_that_cannot_work_are_refused(tmp_path, num_minibatches):
    with pytest.raises(ValueError, match="--num-minibatches"):
        options(tmp_path, num_minibatches=num_minibatches)


def test_the_entropy_bonus_raises_entropy(tmp_path):
    def final_entropy(coefficient, name):
        flags = {"env_id": "toy_envs:Terminated-v0", "learning_rate": 3e-2, "entropy_coef": coefficient}
        path = tmp_path / name
        ppo.train(options(path, total_timesteps=24 * 60, **flags))
        return [value for _, metric, value in rows_of(path / "run") if metric == "train/entropy"][-1]

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
    ppo.load_checkpoint(tmp_path / "run" / "last.pt", network=network)
    return network.value(torch.ones(1, 1)).item()


def test_truncation_does_not_end_the_value(tmp_path):
    # Reward 1 for ever, in episodes that only the clock ends: V = 1 / (1 - 0.9) = 10.
    assert learned_value(tmp_path) == pytest.approx(10, abs=1)


def test_target_kl_ends_the_epochs_early(tmp_path):
    held = ppo.train(options(tmp_path, learning_rate=0.1, update_epochs=10, target_kl=0.0))
    assert held["gradient_steps"] == 3 * 3  # 3 rollouts, one pass over 3 minibatches each


def trained(tmp_path, name, **changes):
    """Return all parameters after a short run, in one vector."""
    ppo.train(options(tmp_path / name, **changes))
    network = checkpoint_of(tmp_path / name / "run")["network"]
    return torch.cat([tensor.flatten() for tensor in network.values()])


def test_the_seed_reaches_the_initial_weights(tmp_path):
    first, second = (trained(tmp_path, f"seed {seed}", seed=seed, learning_rate=1e-12) for seed in (1, 2))
    assert (first - second).abs().max() > 0.1


def test_gae_lambda_reaches_the_advantages(tmp_path):
    assert not torch.equal(trained(tmp_path, "default"), trained(tmp_path, "changed", gae_lambda=0.1))


def test_a_resumed_run_takes_the_flags_of_its_own_command_line(tmp_path, monkeypatch):
    ppo.train(options(tmp_path))
    seen = losses_seen(monkeypatch)
    changes = {"total_timesteps": 144, "optimizer_eps": 0.5, "learning_rate": 0.2, "clip_coef": 0.4}
    result = ppo.train(options(tmp_path, run_dir="", resume=str(tmp_path / "run"), **changes))
    assert (result["global_step"], result["gradient_steps"], len(seen)) == (144, 36, 18)
    (group,) = checkpoint_of(tmp_path / "run")["optimizer"]["param_groups"]
    assert (group["eps"], group["lr"]) == (0.5, pytest.approx(0.2 * 24 / 144))  # of the last of 6 rollouts
    assert [m["clip_coef"] for m in seen[::6]] == pytest.approx([0.4 * 72 / 144, 0.4 * 48 / 144, 0.4 * 24 / 144])


def test_what_is_logged_is_of_the_last_minibatch(tmp_path, monkeypatch):
    log_ratios, value_losses, original, critic_loss = [], [], ppo.ppo_loss, ppo.critic_loss

    def spy(*args):
        loss, log_ratio = original(*args)
        log_ratios.append((log_ratio.detach(), loss.item(), args[-1]))
        return loss, log_ratio

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    monkeypatch.setattr(ppo, "critic_loss", lambda *args: value_losses.append(critic_loss(*args)) or value_losses[-1])
    ppo.train(options(tmp_path, learning_rate=0.1, clip_coef=0.05, anneal_clip=False))
    logged = {metric: value for _, metric, value in rows_of(tmp_path / "run")}  # the last of each metric
    log_ratio, loss, clip_coef = log_ratios[-1]
    outside = ((log_ratio.exp() < 1 - clip_coef) | (log_ratio.exp() > 1 + clip_coef)).float().mean().item()
    assert 0 < outside < 1 and outside != 0.5
    assert logged["train/clip_fraction"] == pytest.approx(outside)
    assert logged["train/approx_kl"] == pytest.approx(ppo.approx_kl(log_ratio))
    assert logged["train/policy_loss"] == pytest.approx(loss)
    assert logged["train/value_loss"] == pytest.approx(value_losses[-1].item())
    assert logged["train/learning_rate"] == pytest.approx(0.1 / 3)  # of the last of 3 rollouts


def test_a_run_ends_once_its_last_100_episodes_have_the_target_return(tmp_path):
    flags = {"env_id": "toy_envs:Constant-v0", "time_limit": 1, "total_timesteps": 240}  # each step is an episode
    assert ppo.train(options(tmp_path, **flags, target_return=1.0))["global_step"] == 120  # of 24 each


def test_explained_variance_is_of_the_rollout(tmp_path, monkeypatch):
    rollouts, compute_gae = [], ppo.compute_gae

    def spy(rewards, values, *rest):
        advantages, returns = compute_gae(rewards, values, *rest)
        rollouts.append(1 - np.var(returns - values[:-1]) / np.var(returns))
        return advantages, returns

    monkeypatch.setattr(ppo, "compute_gae", spy)
    ppo.train(options(tmp_path))
    logged = [value for _, metric, value in rows_of(tmp_path / "run") if metric == "train/explained_variance"]
    assert len(logged) == 3 and logged == pytest.approx(rollouts, abs=1e-5)


def test_it_learns_cartpole(tmp_path):
    result = ppo.train(ppo.Args(total_timesteps=20_000, eval_every=10**6, run_dir=str(tmp_path / "run")))
    assert result["final_return_mean"] > 150  # an untrained network stays near 10


def test_an_untrained_network_has_not_learned(tmp_path):
    args = options(tmp_path, num_steps=9, update_epochs=1, total_timesteps=36, final_eval_episodes=20)
    assert ppo.train(args)["final_return_mean"] < 50


@pytest.mark.parametrize("largest", [0.0, 1e-2])
def test_a_gradient_step_follows_the_gradient_of_its_own_minibatch(largest, tmp_path, monkeypatch):
    networks, parts, gradients, steps = [], {}, [], []
    originals = ppo.log_probs_and_entropy, ppo.ppo_loss, ppo.critic_loss, torch.optim.Adam.step

    class Kept(ppo.ActorCritic):
        def __init__(self, *args):
            super().__init__(*args)
            networks.append(self)

    def spy_on_entropy(*args):
        log_probs, parts["entropy"] = originals[0](*args)
        return log_probs, parts["entropy"]

    def spy_on_policy_loss(*args):
        parts["policy"], log_ratio = originals[1](*args)
        return parts["policy"], log_ratio

    def spy_on_value_loss(*args):  # the last of the three
        value_loss = originals[2](*args)
        loss = parts["policy"] + 0.25 * value_loss - 0.125 * parts["entropy"].mean()
        gradients.append(torch.autograd.grad(loss, list(networks[0].parameters()), retain_graph=True))
        return value_loss

    def spy_on_step(optimizer, *rest):
        norm = torch.cat([gradient.flatten() for gradient in gradients[-1]]).norm()
        scale = min(1.0, largest / norm.item()) if largest else 1.0
        steps.append(scale)
        expected = [scale * gradient for gradient in gradients[-1]]
        given = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-7)
        return originals[3](optimizer, *rest)

    monkeypatch.setattr(ppo, "ActorCritic", Kept)
    monkeypatch.setattr(ppo, "log_probs_and_entropy", spy_on_entropy)
    monkeypatch.setattr(ppo, "ppo_loss", spy_on_policy_loss)
    monkeypatch.setattr(ppo, "critic_loss", spy_on_value_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_on_step)
    result = ppo.train(options(tmp_path, value_coef=0.25, entropy_coef=0.125, max_grad_norm=largest))
    assert len(steps) == result["gradient_steps"] and (min(steps) < 1.0) == bool(largest)


def test_all_columns_of_a_minibatch_are_of_the_same_transitions(tmp_path, monkeypatch):
    # With gamma 0 a return is one reward, and in this environment that is the step plus half the action.
    value, critic_loss, log_probs_and_entropy = ppo.ActorCritic.value, ppo.critic_loss, ppo.log_probs_and_entropy
    last, checked = {}, []

    def spy_on_value(network, obs):
        last["obs"] = obs
        return value(network, obs)

    def spy_on_log_probs(logits, actions):
        last["actions"] = actions
        return log_probs_and_entropy(logits, actions)

    def spy_on_critic_loss(values, returns):
        torch.testing.assert_close(returns, last["obs"][:, 2] + last["actions"] / 2)
        checked.append(len(returns))
        return critic_loss(values, returns)

    monkeypatch.setattr(ppo.ActorCritic, "value", spy_on_value)
    monkeypatch.setattr(ppo, "log_probs_and_entropy", spy_on_log_probs)
    monkeypatch.setattr(ppo, "critic_loss", spy_on_critic_loss)
    ppo.train(options(tmp_path, env_id="toy_envs:Terminated-v0", gamma=0.0))
    assert checked == [8] * 3 * 2 * 3  # rollouts * epochs * minibatches
