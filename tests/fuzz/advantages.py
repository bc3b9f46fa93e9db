"""Turns, V-trace, rollouts, estimators of groups and steps, rewards of tokens: each against a loop."""

import math

import torch

from fuzz.batches import Batch
from fuzz.draws import INF, NAN
from fuzz.trial import case, eps

KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.expm1(-d) + d}


def size_of(x):
    return 1 + x.abs().max() if x.numel() else x


def expect(trial, what, got, truth, terms=1):
    trial.expect(what, got, truth, 64 * eps(got) * max(terms, 1) * size_of(truth))


def live_places(batch):
    """The live tokens of each sequence, by their flat places."""
    live = batch.live.flatten().tolist()
    of = batch.sequence.tolist()
    return [[t for t in range(len(live)) if of[t] == s and live[t]] for s in range(batch.count)]


def per_sequence(draw, batch, low=None):
    dtype = draw.choice((torch.float32, torch.float64))
    x = draw.normal((batch.count,), dtype) if low is None else draw.uniform((batch.count,), low, 1.0, dtype)
    return draw.laid_out(x)


def numbers(*tensors):
    return [x.double().flatten().tolist() for x in tensors]


def filled(batch, found):
    return torch.tensor([found.get(t, 0.0) for t in range(batch.live.numel())], dtype=torch.float64).view(batch.shape)


@case("valid")
def gae_of_turns(trial):
    draw, batch = trial.draw, Batch(trial.draw)
    columns, ends = [draw.column(batch.live) for _ in range(2)], draw.coins(batch.shape, 0.3)
    lam, across = per_sequence(draw, batch, 0.0), per_sequence(draw, batch, 0.0)
    end = per_sequence(draw, batch) if draw.flag(0.5) else None
    real = torch.float64 if torch.float64 in (x.dtype for x in columns) else torch.float32
    got = trial.call(
        "gae",
        *columns,
        batch.mask,
        gamma=0.9,
        lam=lam,
        turn_ends=draw.masked(ends),
        turn_gamma=0.8,
        turn_lam=across,
        bootstrap_values=end,
        **batch.packing(),
    )
    (rewards, values), ends = numbers(*columns), ends.flatten().tolist()
    advantages, returns = {}, {}
    for s, places in enumerate(live_places(batch)):
        following, trace = 0.0 if end is None else end[s].to(real).item(), 0.0
        own = {}
        for t in reversed([t for t in places if ends[t] or t == places[-1]]):
            trace = rewards[t] + 0.8 * following - values[t] + 0.8 * across[s].item() * trace
            following, own[t] = values[t], trace + values[t]
        for t in reversed(places):
            following, trace = (0.0, 0.0) if t in own else (following, trace)
            trace = own.get(t, rewards[t]) + 0.9 * following - values[t] + 0.9 * lam[s].item() * trace
            following, advantages[t], returns[t] = values[t], trace, trace + values[t]
    for name, g, found in zip(("advantages", "returns"), got, (advantages, returns), strict=True):
        expect(trial, f"{name} of turns", g, filled(batch, found), batch.shape[-1])


@case("valid")
def vtrace(trial):
    draw, batch = trial.draw, Batch(trial.draw)
    columns = [draw.column(batch.live, 0.7) for _ in range(4)]
    gamma, lam = draw.choice((0.9, 1.0, 0)), draw.choice((1.0, 0.5))
    bounds = [draw.choice((1.0, 0.5, 3)) for _ in range(3)]
    over = draw.coins(batch.shape, 0.2)
    end = per_sequence(draw, batch) if draw.flag(0.5) else None
    options = {"gamma": gamma, "lam": lam, "rho_max": bounds[0], "c_max": bounds[1], "advantage_rho_max": bounds[2]}
    options["terminated"] = draw.masked(over)
    got = trial.call("vtrace", *columns, batch.mask, bootstrap_values=end, **options, **batch.packing())
    (rewards, values, new, old), over = numbers(*columns), over.flatten().tolist()
    advantages, targets = {}, {}
    for s, places in enumerate(live_places(batch)):
        value = target = 0.0 if end is None else end[s].item()
        for t in reversed(places):
            value, target = (0.0, 0.0) if over[t] else (value, target)
            ratio = math.exp(new[t] - old[t])
            gain = rewards[t] + gamma * target - values[t]
            step = min(bounds[0], ratio) * (rewards[t] + gamma * value - values[t])
            targets[t] = values[t] + step + gamma * lam * min(bounds[1], ratio) * (target - value)
            advantages[t] = min(bounds[2], ratio) * gain
            value, target = values[t], targets[t]
    for name, g, found in zip(("advantages", "targets"), got, (advantages, targets), strict=True):
        expect(trial, f"{name} of V-trace", g, filled(batch, found), 3 * batch.shape[-1])


@case("valid")
def rollout_gae(trial):
    draw = trial.draw
    steps, others, gamma, lam = draw.choice((0, 1, 2, 6)), draw.choice((0, 1, 3)), draw.choice((0.9, 1)), 0.8
    shape, axis = draw.choice((((steps, others), 0), ((others, steps), 1), ((others, steps, 1), -2)))
    rest = [n for k, n in enumerate(shape) if k != axis % len(shape)]
    columns = [draw.laid_out(draw.normal(shape, draw.dtype())) for _ in range(3)]
    flags = [draw.coins(shape, 0.3) for _ in range(3)]
    kind = draw.choice(("dones", "starts", "terminated", "cuts", "all"))
    first, none = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    given, last = {}, None
    if kind in ("dones", "starts", "terminated"):
        last = draw.laid_out(draw.normal(rest, draw.dtype()))
        given["dones" if kind != "terminated" else kind] = draw.masked(flags[0])
        end = terminal = flags[0]
        if kind == "starts":
            after = draw.coins(rest, 0.5)
            given |= {"dones_at": "start", "last_dones": draw.masked(after)}
            end = terminal = torch.cat([flags[0].movedim(axis, 0)[1:], after[None]])[:steps].movedim(0, axis)
        following = torch.cat([columns[1].double().movedim(axis, 0)[1:], last.double()[None]])[:steps].movedim(0, axis)
    else:
        following = columns[2].double()
        given |= {"next_values": columns[2], "truncated": draw.masked(flags[1])}
        terminal = flags[0] if kind == "all" else none
        if kind == "all":
            given |= {"terminated": draw.masked(flags[0]), "dones": draw.masked(flags[2])}
        end = first | flags[1] | (flags[0] | flags[2] if kind == "all" else none)
    got = trial.call("rollout_gae", *columns[:2], last, time_dim=axis, gamma=gamma, lam=lam, **given)
    rewards, values, following, end, terminal = (
        x.double().movedim(axis, 0) for x in (*columns[:2], following, end, terminal)
    )
    truth, trace = torch.zeros(rewards.shape, dtype=torch.float64), torch.zeros(rest, dtype=torch.float64)
    for t in reversed(range(steps)):
        trace = rewards[t] + gamma * following[t] * (1 - terminal[t]) - values[t] + gamma * lam * (1 - end[t]) * trace
        truth[t] = trace
    for name, g, x in zip(("advantages", "returns"), got, (truth, truth + values), strict=True):
        expect(trial, f"{name} of a rollout, {kind}", g, x.movedim(0, axis), steps)


def mean_of(values):
    return sum(values) / len(values)


def spread_of(values, unbiased):
    return math.sqrt(sum((x - mean_of(values)) ** 2 for x in values) / max(len(values) - unbiased, 1))


def baseline_of(kind, i, group, scored, values, lengths):
    """What response ``i`` is compared with; ``group``, ``scored``: responses of its group, and of all groups."""
    match kind:
        case "mean":
            return mean_of([values[j] for j in group])
        case "leave-one-out":
            return mean_of([values[j] for j in group if j != i])
        case "length-mean":
            return sum(float(lengths[j]) * values[j] for j in group) / sum(float(lengths[j]) for j in group)
        case "batch-mean":
            return mean_of([values[j] for j in scored])
        case "runner-up":
            return sorted(values[j] for j in group)[-2] if values[i] == max(values[j] for j in group) else values[i]
    return 0.0


def scale_of(kind, group, scored, values, unbiased):
    match kind:
        case "std":
            return spread_of([values[j] for j in group], unbiased)
        case "batch-std":
            return spread_of([values[j] for j in scored], unbiased)
        case "mean":
            return mean_of([values[j] for j in group])
        case "nonzero-share":
            return sum(values[j] != 0 for j in scored) / len(scored)
    return None


OF_A_GROUP = ("mean", "leave-one-out", "length-mean", "runner-up")


def truth_of_a_reward(values, names, lengths, baseline, scale, small, unbiased, singleton):
    """The advantage of each response by one reward."""
    scored = [i for i, x in enumerate(values) if not math.isnan(x)]
    truth = torch.zeros(len(values), dtype=torch.float64)
    for i in scored:
        group = [j for j in scored if names[j] == names[i]]
        alone = len(group) < 2 and (baseline in OF_A_GROUP or scale in ("std", "mean"))
        if alone and singleton == "zero":
            continue  # nothing to compare it with
        if alone and scale in ("std", "mean", None):
            truth[i] = values[i] / (1 + small if singleton == "scaled" else 1)
            continue
        size = scale_of(scale, group, scored, values, unbiased)
        gap = values[i] - (0.0 if alone else baseline_of(baseline, i, group, scored, values, lengths))
        truth[i] = gap if size is None else 0.0 if size < 1e-12 else gap / (size + small)
    return truth


@case("valid")
def group_advantages(trial):
    draw = trial.draw
    count, scale = draw.choice((0, 1, 2, 5, 9)), draw.choice(("std", "batch-std", "mean", "nonzero-share", None))
    weights = draw.choice((None, None, (1.0,), (0.5, -2.0)))
    shape = (count,) if weights is None else (count, len(weights))
    rewards = draw.normal(shape, draw.choice((torch.float32, *draw.floats)))
    rewards = rewards.round() if draw.flag(0.3) else rewards
    rewards = rewards.abs() + 0.1 if scale == "mean" else rewards
    rewards = draw.laid_out(torch.where(draw.coins(shape, 0.1), NAN, rewards).to(rewards.dtype))
    some = (
        draw.integers(-(2**63), 2**63 - 1, (3,))
        if draw.flag(0.5)
        else torch.tensor([0, 1, 7], dtype=draw.choice((torch.int8, torch.uint8, torch.int32)))
    )
    ids = some[draw.integers(0, 3, (count,))]
    baseline, small, unbiased = (
        draw.choice((*OF_A_GROUP, "batch-mean", None)),
        draw.choice((1e-6, 0, 0.1)),
        draw.flag(0.5),
    )
    singleton = draw.choice(("zero", "raw", "scaled") if scale == "std" else ("zero", "raw"))
    lengths = draw.laid_out(draw.integers(1, 9, (count,))) if baseline == "length-mean" else None
    columns = [rewards.double().tolist()] if weights is None else rewards.double().T.tolist()
    moments = None
    if weights is None and (baseline == "batch-mean" or scale == "batch-std") and draw.flag(0.5):
        scored = [x for x in columns[0] if not math.isnan(x)]
        mean = mean_of(scored) if scored else 0.0
        moments = (len(scored), mean, math.fsum((x - mean) ** 2 for x in scored) if len(set(scored)) > 1 else 0.0)
    got = trial.call(
        "group_advantages",
        rewards,
        draw.laid_out(ids, keep=True),
        baseline=baseline,
        scale=scale,
        eps=small,
        unbiased=unbiased,
        singleton=singleton,
        reward_weights=torch.tensor(weights) if weights is not None and draw.flag(0.5) else weights,
        lengths=lengths,
        moments=moments,
    )
    given = ids.tolist(), lengths, baseline, scale, small, unbiased, singleton
    truths = [truth_of_a_reward(column, *given) for column in columns]
    truth = sum((w * x for w, x in zip(weights or (1.0,), truths, strict=True)), torch.zeros(count).double())
    terms = sum((abs(w) * x.abs() for w, x in zip(weights or (1.0,), truths, strict=True)), torch.ones(count).double())
    trial.expect(f"advantages over {baseline} by {scale}", got, truth, 1e-6 * terms)


def some_ids(draw, count, names=3):
    ids = draw.integers(-(2**63), 2**63 - 1, (names,)) if draw.flag(0.5) else torch.arange(names)
    return ids[draw.integers(0, names, (count,))]


@case("valid")
def broadcast_advantages(trial):
    draw, count = trial.draw, trial.draw.choice((0, 1, 4, 7))
    ids = some_ids(draw, count)
    last = torch.tensor([i not in ids.tolist()[:k] for k, i in enumerate(ids.tolist())], dtype=torch.bool)
    x = draw.column(last)
    got = trial.call("broadcast_advantages", x, draw.masked(last), draw.laid_out(ids, keep=True))
    own = {i: x[k].double().item() for k, i in enumerate(ids.tolist()) if last[k]}
    expect(trial, "advantages of trajectories", got, torch.tensor([own[i] for i in ids.tolist()], dtype=torch.float64))


def mean_and_std(xs, unbiased=True):
    mean = sum(xs) / len(xs)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in xs) / max(len(xs) - unbiased, 1))


def normalised(x, group, scale, small, unbiased=True):
    """One number against its group."""
    if len(group) < 2:
        return 0.0
    mean, spread = mean_and_std(group, unbiased)
    return x - mean if scale is None else 0.0 if spread < 1e-12 else (x - mean) / (spread + small)


@case("valid")
def step_advantages(trial):
    draw, batch = trial.draw, Batch(trial.draw)
    ends = draw.coins(batch.shape, 0.5)
    seen = ends & batch.live
    rewards = draw.column(seen)
    rewards = torch.where(draw.coins(batch.shape, 0.1), NAN, rewards).to(rewards.dtype)
    ids, scale, small, unbiased = some_ids(draw, batch.count, 2), draw.choice(("std", None)), 0.01, draw.flag(0.5)
    got = trial.call(
        "step_advantages",
        rewards,
        draw.masked(ends),
        draw.laid_out(ids, keep=True),
        batch.mask,
        scale=scale,
        eps=small,
        unbiased=unbiased,
        **batch.packing(),
    )
    (values,), seen, names = numbers(rewards), seen.flatten().tolist(), ids.tolist()
    scored = [t for t in range(len(values)) if seen[t] and not math.isnan(values[t])]
    of, found = batch.sequence.tolist(), {}
    for s, places in enumerate(live_places(batch)):
        group = [values[t] for t in scored if names[of[t]] == names[s]]
        total = 0.0
        for t in reversed(places):
            total += normalised(values[t], group, scale, small, unbiased) if t in scored else 0.0
            found[t] = total
    truth = filled(batch, found)
    trial.expect("advantages of steps", got, truth, 1e-5 * size_of(truth))


@case("valid")
def gigpo_advantages(trial):
    draw, count = trial.draw, trial.draw.choice((0, 1, 2, 5, 9))
    ids, states, scale = some_ids(draw, count), some_ids(draw, count, 2), draw.choice(("std", None))
    runs = some_ids(draw, count, 4) if draw.flag(0.5) else None
    rewards = [draw.laid_out(draw.normal((count,), draw.dtype())) for _ in range(2)]
    singleton = draw.choice(("zero", "raw", "scaled") if scale else ("zero", "raw"))
    options = {"scale": scale, "eps": 0.01, "unbiased": draw.flag(0.5), "singleton": singleton}
    weight = draw.number(draw.choice((1.0, 0.5)))
    got = trial.call(
        "gigpo_advantages",
        *rewards,
        draw.laid_out(ids, keep=True),
        draw.laid_out(states, keep=True),
        step_weight=weight,
        trajectory_ids=runs,
        **options,
    )
    real = torch.float64 if torch.float64 in (x.dtype for x in rewards) else torch.float32
    episode, step = numbers(*(x.to(real) for x in rewards))
    ids, states, truth = ids.tolist(), states.tolist(), torch.zeros(count, dtype=torch.float64)
    once = [k for k in range(count) if runs is None or runs[k] not in runs[:k]]
    for k in range(count):
        # Rows of a trajectory have the advantage of its first one.
        first = k if runs is None else runs.tolist().index(runs[k])
        group = [episode[j] for j in once if ids[j] == ids[first]]
        own = normalised(episode[first], group, scale, 0.01, options["unbiased"])
        if len(group) == 1 and singleton != "zero":
            own = episode[first] / (1.01 if singleton == "scaled" else 1.0)
        same = [step[j] for j in range(count) if (ids[j], states[j]) == (ids[k], states[k])]
        truth[k] = own + float(weight) * normalised(step[k], same, scale, 0.01, options["unbiased"])
    trial.expect("advantages of an agent's steps", got, truth, 1e-5 * size_of(truth))


@case("valid")
def optimal_token_advantages(trial):
    draw, batch = trial.draw, Batch(trial.draw)
    rewards, weights = draw.column(batch.live), draw.column(batch.live) if draw.flag(0.5) else None
    logs = [
        draw.with_garbage(-draw.uniform(batch.shape, 0.1, 3.0, draw.choice((torch.float32, torch.float64))), batch.live)
        for _ in range(2)
    ]
    aligned, singleton, ids = draw.flag(0.5), draw.choice(("zero", "raw")), some_ids(draw, batch.count, 2)
    got = trial.call(
        "optimal_token_advantages",
        rewards,
        *logs,
        draw.laid_out(ids, keep=True),
        batch.mask,
        weights=weights,
        alignment="live" if aligned else "position",
        singleton=singleton,
        eps=0.01,
        **batch.packing(),
    )
    values, chance, squares = numbers(rewards, *logs)
    factors = [1.0] * len(values) if weights is None else numbers(weights)[0]
    of, firsts = batch.sequence.tolist(), {}
    for t, s in enumerate(of):
        firsts.setdefault(s, t)
    gains, variance, column = {}, {}, {}
    for places in live_places(batch):
        for k, t in enumerate(places):
            column[t] = k if aligned else t - firsts[of[t]]
            gains[t] = sum(values[j] for j in places[k:])
            variance[t] = sum(
                factors[j] ** 2 * (1 - 2 * math.exp(chance[j]) + math.exp(squares[j])) for j in places[: k + 1]
            )
    found, names = {}, ids.tolist()
    for t in gains:
        mine = [j for j in gains if names[of[j]] == names[of[t]]]
        shared = [column[j] for j in mine if sum(column[i] == column[j] for i in mine) > 1]
        last, here = max(shared, default=-1), [j for j in mine if column[j] == column[t]]
        base = sum(gains[j] * variance[j] for j in here) / (sum(variance[j] for j in here) + 0.01)
        found[t] = 0.0 if last < 0 and singleton == "zero" else gains[t] - (base if column[t] <= last else 0.0)
    # A sum of variances near 0 divides what is left of larger terms.
    least = min((abs(sum(variance[j] for j in gains if column[j] == column[t]) + 0.01) for t in gains), default=1.0)
    truth = filled(batch, found)
    steep = sum(map(abs, variance.values())) / min(least, 1.0) + 1
    trial.expect("advantages over the optimal baseline", got[0], truth, 1e-5 * steep * size_of(truth))
    expect(trial, "returns", got[1], filled(batch, gains), batch.shape[-1])


@case("valid")
def assemble_rewards(trial):
    draw, batch = trial.draw, Batch(trial.draw)
    mask = draw.masked(batch.live)
    placement = draw.choice(("last-action", "trl-end", "deepspeed-end", "token-level"))
    of = batch.sequence.tolist()
    tokens = [[t for t in range(len(of)) if of[t] == s] for s in range(batch.count)]
    at = []
    for own, live in zip(tokens, live_places(batch), strict=True):
        last = live[-1] if live else own[-1] if own else None
        at.append(last if placement == "last-action" or last is None else min(last + 1, own[-1]))
    seen = batch.live.flatten().clone()
    if placement == "deepspeed-end":
        seen[[t for t in at if t is not None]] = True
    seen = seen.view(batch.shape)
    logs = [draw.column(seen) for _ in range(2)]
    scores = draw.column(batch.live) if placement == "token-level" else per_sequence(draw, batch)
    kl, coef, clip = draw.choice(tuple(KL)), draw.number(draw.choice((0.3, 0, -1.0))), draw.choice((None, (-0.5, 1)))
    got = trial.call(
        "assemble_rewards",
        scores,
        mask,
        logprobs=logs[0],
        ref_logprobs=logs[1],
        kl=kl,
        kl_coef=coef,
        score_clip=clip,
        placement=placement,
        **batch.packing(),
    )
    low, high = clip or (-INF, INF)
    (values,), (new, old), found = numbers(scores), numbers(*logs), {}
    for t in range(len(of)):
        if seen.flatten()[t]:
            found[t] = -max(float(coef), 0) * KL[kl](new[t] - old[t])
        if placement == "token-level" and batch.live.flatten()[t]:
            found[t] += min(max(values[t], low), high)
    for s, t in enumerate(at):
        if t is not None and placement != "token-level":
            found[t] = found.get(t, 0.0) + min(max(values[s], low), high)
    expect(trial, f"rewards, {placement}", got, filled(batch, found))


@case("valid")
def extended_mask(trial):
    batch = Batch(trial.draw)
    got = trial.call("extended_mask", trial.draw.masked(batch.live), batch.offsets)
    truth, of = batch.live.flatten().clone(), batch.sequence.tolist()
    for s, places in enumerate(live_places(batch)):
        if places and places[-1] + 1 < len(of) and of[places[-1] + 1] == s:
            truth[places[-1] + 1] = True
    trial.expect("mask of values", got, truth.view(batch.shape), 0.0)


@case("valid")
def process_sequences(trial):
    draw, shape = trial.draw, (trial.draw.choice((0, 1, 4)), trial.draw.choice((2, 3, 7)))
    ids = draw.integers(0, 4, shape, draw.choice((torch.int64, torch.int32, torch.uint8)))
    prompt = draw.randint(1, shape[1] - 1)
    got = trial.call("process_sequences", draw.laid_out(ids, keep=True), prompt, eos_id=2, pad_id=0)
    truth = [torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)]
    truth.append(torch.zeros(shape[0], shape[1] - prompt, dtype=torch.bool))
    for i, row in enumerate(ids.tolist()):
        real = [t for t, x in enumerate(row) if x not in (0, 2)]
        end = min(real[-1] + 1, shape[1] - 1) if real else shape[1] - 1
        row[end] = 2
        truth[0][i] = torch.tensor(row)
        truth[1][i, (real[0] if real else 0) : end + 1] = True
        truth[2][i] = torch.tensor([k == 0 or x not in (0, 2) for k, x in enumerate(row[prompt - 1 : -1])])
    for name, g, x in zip(("sequences", "attention", "actions"), got, truth, strict=True):
        trial.expect(name, g, x.to(g.dtype), 0.0)


@case("valid")
def length_penalty(trial):
    draw, count = trial.draw, trial.draw.choice((0, 1, 5))
    lengths = draw.integers(0, 40, (count,), draw.choice((torch.int64, torch.int32, torch.float32, torch.float64)))
    most, buffer, factor = draw.choice((20, 30.0)), draw.choice((5, 20)), draw.number(draw.choice((1.0, 0.5)))
    got = trial.call("length_penalty", draw.laid_out(lengths), max_length=most, buffer=buffer, factor=factor)
    if count:  # the layout may repeat elements
        trial.expect("bounds of a penalty", (got <= 0) & (got >= -float(factor)), torch.ones(count).bool(), 0.0)
    got = trial.call("length_penalty", lengths, max_length=most, buffer=buffer, factor=factor)
    truth = [-float(factor) * max(0.0, min(buffer, x - (most - buffer))) / buffer for x in lengths.tolist()]
    expect(trial, "penalty of length", got, torch.tensor(truth, dtype=torch.float64))


@case("valid")
def truncation_penalty(trial):
    draw, count = trial.draw, trial.draw.choice((0, 1, 5))
    cut, coef = draw.coins((count,), 0.5), draw.choice((0, 0.5, 1, -0.5))
    scores = draw.laid_out(draw.normal((count,), draw.dtype()), keep=True)
    got = trial.call("truncation_penalty", scores, draw.masked(cut), coef)
    (values,) = numbers(scores)
    truth = [(x * coef if coef >= 0 else coef) if c else x for x, c in zip(values, cut.tolist(), strict=True)]
    expect(trial, "scores of truncated answers", got, torch.tensor(truth, dtype=torch.float64))


@case("valid")
def dynamic_sampling_mask(trial):
    draw, count = trial.draw, trial.draw.choice((1, 4, 9))
    ids, scores = some_ids(draw, count), draw.normal((count,), draw.dtype())
    scores = draw.laid_out(torch.where(draw.coins((count,), 0.1), NAN, scores).to(scores.dtype), keep=True)
    low, high = draw.choice((-0.3123, 0)), draw.choice((0.4321, 1))
    got = trial.call("dynamic_sampling_mask", scores, draw.laid_out(ids, keep=True), low=low, high=high)
    (values,), names, truth = numbers(scores), ids.tolist(), []
    for k, x in enumerate(values):
        group = [y for j, y in enumerate(values) if names[j] == names[k] and not math.isnan(y)]
        truth.append(not math.isnan(x) and low < sum(group) / len(group) < high)
    trial.expect("groups kept", got, torch.tensor(truth), 0.0)
