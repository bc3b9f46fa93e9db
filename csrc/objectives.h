// Printed by `python -m rlkernels.objectives.codegen`; a test holds it fresh. Do not edit.
#pragma once
#include "objective_functions.h"

#define RLK_OBJECTIVES_DIGEST "00d9b2b21cc29dd7"

#define RLK_OBJECTIVES(X) \
  X(k1, 2, 0) \
  X(k2, 2, 0) \
  X(k3, 2, 0) \
  X(kl_abs, 2, 0) \
  X(kl_term, 3, 8) \
  X(reinforce, 2, 0) \
  X(surrogate, 3, 0) \
  X(ppo_clip, 3, 2) \
  X(dual_clip, 3, 3) \
  X(ppo_clip_cap, 3, 3) \
  X(cispo, 3, 2) \
  X(cispo_max_only, 3, 1) \
  X(cispo_absolute, 3, 1) \
  X(dro, 3, 1) \
  X(sapo, 3, 2) \
  X(rollout_is, 3, 2) \
  X(dppo_tv, 3, 3) \
  X(dppo_tv_surrogate, 3, 2) \
  X(dppo_kl, 3, 3) \
  X(dppo_kl_surrogate, 3, 2) \
  X(tv_symmetric, 3, 1) \
  X(ref_kl, 3, 1) \
  X(pairwise, 1, 0) \
  X(dpo_sigmoid, 1, 2) \
  X(robust, 1, 2) \
  X(exo_pair, 1, 2) \
  X(hinge, 1, 1) \
  X(ipo, 1, 1) \
  X(kto, 1, 1) \
  X(discopop, 1, 2) \
  X(alpha_divergence, 1, 1) \
  X(js_divergence, 1, 0) \
  X(log_odds, 1, 0) \
  X(nll, 1, 0) \
  X(dft, 1, 0) \
  X(value_plain, 2, 0) \
  X(value_clip, 3, 1)

#define RLK_ROW_OBJECTIVES(X) \
  X(k1, 2, 0) \
  X(k2, 2, 0) \
  X(k3, 2, 0) \
  X(kl_abs, 2, 0) \
  X(reinforce, 2, 0) \
  X(surrogate, 3, 0) \
  X(ppo_clip, 3, 2) \
  X(dual_clip, 3, 3) \
  X(ppo_clip_cap, 3, 3) \
  X(cispo, 3, 2) \
  X(cispo_max_only, 3, 1) \
  X(cispo_absolute, 3, 1) \
  X(dro, 3, 1) \
  X(sapo, 3, 2) \
  X(rollout_is, 3, 2) \
  X(dppo_tv, 3, 3) \
  X(dppo_tv_surrogate, 3, 2) \
  X(dppo_kl, 3, 3) \
  X(dppo_kl_surrogate, 3, 2) \
  X(tv_symmetric, 3, 1) \
  X(ref_kl, 3, 1) \
  X(nll, 1, 0) \
  X(dft, 1, 0)

namespace rlk {

struct k1 {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S ref_logp) const {
    return {(logp - ref_logp), S(1.0)};
  }
};

struct k2 {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S ref_logp) const {
    const S gap = (logp - ref_logp);
    return {((S(0.5) * gap) * gap), gap};
  }
};

struct k3 {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S ref_logp) const {
    const S gap = (ref_logp - logp);
    return {(rlk::expm1(gap) - gap), (-rlk::expm1(gap))};
  }
};

struct kl_abs {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S ref_logp) const {
    const S gap = (logp - ref_logp);
    return {rlk::where((gap < S(0.0)), (-gap), gap), rlk::where((gap > S(0.0)), S(1.0), rlk::where((gap < S(0.0)), (-S(1.0)), gap))};
  }
};

struct kl_term {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S ref_logp, S old_logp, S order, S low, S high, S value_low, S value_high, S cap, S moving, S straight) const {
    const S gap = (logp - ref_logp);
    const S held = rlk::where((gap < low), low, rlk::where((gap > high), high, gap));
    const S tail = rlk::expm1((-held));
    const S first = rlk::where((order < S(0.5)), rlk::where((held < S(0.0)), (-held), held), held);
    const S first_slope = rlk::where((order < S(0.5)), rlk::where((held > S(0.0)), S(1.0), rlk::where((held < S(0.0)), (-S(1.0)), held)), S(1.0));
    const S second = rlk::where((order < S(2.5)), ((S(0.5) * held) * held), (tail + held));
    const S second_slope = rlk::where((order < S(2.5)), held, (-tail));
    const S estimate = rlk::where((order < S(1.5)), first, second);
    const S inner = rlk::where((order < S(1.5)), first_slope, second_slope);
    const S bounded = rlk::clip(estimate, value_low, value_high);
    const S inside = rlk::where((gap < low), S(0.0), rlk::where((gap > high), S(0.0), inner));
    const S slope = rlk::where((estimate < value_low), S(0.0), rlk::where((estimate > value_high), S(0.0), inside));
    const S ratio = rlk::exp((logp - old_logp));
    const S weight = rlk::where((ratio > cap), cap, ratio);
    const S through = rlk::where((ratio > cap), slope, (slope + (moving * bounded)));
    const S push = rlk::where((straight > S(0.5)), gap, through);
    const S value = rlk::where((bounded > S(0.0)), (weight * bounded), rlk::where((bounded < S(0.0)), (weight * bounded), bounded));
    const S grown = rlk::where((push > S(0.0)), (weight * push), rlk::where((push < S(0.0)), (weight * push), push));
    return {rlk::where((straight > S(0.5)), bounded, value), grown};
  }
};

struct reinforce {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S advantage) const {
    return {((-advantage) * logp), (-advantage)};
  }
};

struct surrogate {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    return {(-free), (-free)};
  }
};

struct ppo_clip {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S clip_low, S clip_high) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    const S held = (rlk::clip(ratio, (S(1.0) - clip_low), (S(1.0) + clip_high)) * advantage);
    return {(-rlk::where((held < free), held, free)), (-rlk::where((held < free), S(0.0), free))};
  }
};

struct dual_clip {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S clip_low, S clip_high, S dual_clip) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    const S held = (rlk::clip(ratio, (S(1.0) - clip_low), (S(1.0) + clip_high)) * advantage);
    const S gain = rlk::where((held < free), held, free);
    const S slope = rlk::where((held < free), S(0.0), free);
    const S bound = rlk::where((advantage < S(0.0)), (dual_clip * advantage), gain);
    return {(-rlk::where((gain < bound), bound, gain)), (-rlk::where((gain < bound), S(0.0), slope))};
  }
};

struct ppo_clip_cap {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S ratio_cap, S clip_low, S clip_high) const {
    const S ratio = rlk::exp((logp - old_logp));
    const S free = (rlk::where((ratio > ratio_cap), ratio_cap, ratio) * advantage);
    const S held = (rlk::clip(ratio, (S(1.0) - clip_low), (S(1.0) + clip_high)) * advantage);
    const S slope = rlk::where((ratio > ratio_cap), (S(0.0) * advantage), free);
    const S inside = rlk::where((ratio < (S(1.0) - clip_low)), S(0.0), rlk::where((ratio > (S(1.0) + clip_high)), S(0.0), held));
    return {(-rlk::where((held < free), held, free)), (-rlk::where((held < free), inside, slope))};
  }
};

struct cispo {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S clip_low, S clip_high) const {
    const S weight = (rlk::clip(rlk::exp((logp - old_logp)), (S(1.0) - clip_low), (S(1.0) + clip_high)) * advantage);
    return {((-weight) * logp), (-weight)};
  }
};

struct cispo_max_only {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S clip_high) const {
    const S ratio = rlk::exp((logp - old_logp));
    const S cap = (S(1.0) + clip_high);
    const S weight = (rlk::where((ratio > cap), cap, ratio) * advantage);
    return {((-weight) * logp), (-weight)};
  }
};

struct cispo_absolute {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S ratio_max) const {
    const S ratio = rlk::exp((logp - old_logp));
    const S weight = (rlk::where((ratio > ratio_max), ratio_max, ratio) * advantage);
    return {((-weight) * logp), (-weight)};
  }
};

struct dro {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S beta) const {
    const S gap = (logp - old_logp);
    return {((((S(0.5) * beta) * gap) * gap) - (advantage * logp)), ((beta * gap) - advantage)};
  }
};

struct sapo {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S tau_pos, S tau_neg) const {
    const S ratio = rlk::exp((logp - old_logp));
    const S tau = rlk::where((advantage > S(0.0)), tau_pos, tau_neg);
    const S reach = (tau * (ratio - S(1.0)));
    const S gate = rlk::sigmoid(reach);
    const S tail = rlk::sigmoid((-reach));
    const S slope = rlk::where((tail <= S(0.0)), (S(0.0) * advantage), (tail * ratio));
    return {((((-S(4.0)) / tau) * gate) * advantage), ((((-S(4.0)) * gate) * slope) * advantage)};
  }
};

struct rollout_is {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S rollout_logp, S advantage, S clip_low, S clip_high) const {
    const S ratio = rlk::exp((logp - rollout_logp));
    const S inside = rlk::where((ratio <= (S(1.0) - clip_low)), (S(0.0) * advantage), (ratio * advantage));
    const S weight = rlk::where((ratio >= (S(1.0) + clip_high)), (S(0.0) * advantage), inside);
    return {((-weight) * logp), (-weight)};
  }
};

struct dppo_tv {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S delta_low, S delta_high, S ratio_max) const {
    const S ratio = rlk::exp((logp - old_logp));
    const S shift = (rlk::exp(logp) - rlk::exp(old_logp));
    const S gate = rlk::where((advantage > S(0.0)), (shift - delta_high), ((-shift) - delta_low));
    const S weight = rlk::where((gate > S(0.0)), (S(0.0) * advantage), (rlk::where((ratio > ratio_max), ratio_max, ratio) * advantage));
    return {((-weight) * logp), (-weight)};
  }
};

struct dppo_tv_surrogate {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S delta_low, S delta_high) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    const S shift = (rlk::exp(logp) - rlk::exp(old_logp));
    const S gate = rlk::where((advantage > S(0.0)), (shift - delta_high), ((-shift) - delta_low));
    const S kept = rlk::where((gate > S(0.0)), (S(0.0) * advantage), free);
    return {(-kept), (-kept)};
  }
};

struct dppo_kl {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S delta_low, S delta_high, S ratio_max) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S other = (-rlk::expm1(old_logp));
    const S divergence = ((other * rlk::log(((other + S(1e-08)) / (S(1e-08) - rlk::expm1(logp))))) - (rlk::exp(old_logp) * gap));
    const S gate = rlk::where((advantage > S(0.0)), (divergence - delta_high), (divergence - delta_low));
    const S away = rlk::where((advantage > S(0.0)), gap, (-gap));
    const S far = rlk::where((away > S(0.0)), gate, (-S(1.0)));
    const S weight = rlk::where((far > S(0.0)), (S(0.0) * advantage), (rlk::where((ratio > ratio_max), ratio_max, ratio) * advantage));
    return {((-weight) * logp), (-weight)};
  }
};

struct dppo_kl_surrogate {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S old_logp, S advantage, S delta_low, S delta_high) const {
    const S gap = (logp - old_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    const S other = (-rlk::expm1(old_logp));
    const S divergence = ((other * rlk::log(((other + S(1e-08)) / (S(1e-08) - rlk::expm1(logp))))) - (rlk::exp(old_logp) * gap));
    const S gate = rlk::where((advantage > S(0.0)), (divergence - delta_high), (divergence - delta_low));
    const S away = rlk::where((advantage > S(0.0)), gap, (-gap));
    const S far = rlk::where((away > S(0.0)), gate, (-S(1.0)));
    const S kept = rlk::where((far > S(0.0)), (S(0.0) * advantage), free);
    return {(-kept), (-kept)};
  }
};

struct tv_symmetric {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S rollout_logp, S advantage, S delta) const {
    const S gap = (logp - rollout_logp);
    const S ratio = rlk::exp(gap);
    const S free = rlk::where((advantage > S(0.0)), (ratio * advantage), rlk::where((advantage < S(0.0)), (ratio * advantage), (advantage * gap)));
    const S shift = (rlk::exp(logp) - rlk::exp(rollout_logp));
    const S kept = rlk::where((shift > delta), (S(0.0) * advantage), rlk::where(((-shift) > delta), (S(0.0) * advantage), free));
    return {(-kept), (-kept)};
  }
};

struct ref_kl {
  template <class S>
  RLK_HD Term<S> operator()(S logp, S rollout_logp, S ref_logp, S delta_low) const {
    const S gap = (logp - rollout_logp);
    const S ratio = rlk::exp(gap);
    const S gain = (ref_logp - logp);
    const S free = rlk::where((gain > S(0.0)), (ratio * gain), rlk::where((gain < S(0.0)), (ratio * gain), (gain * gap)));
    const S gate = ((rlk::exp(rollout_logp) - rlk::exp(logp)) - delta_low);
    const S kept = rlk::where((gate > S(0.0)), (S(0.0) * gain), free);
    return {(-kept), (-kept)};
  }
};

struct pairwise {
  template <class S>
  RLK_HD Term<S> operator()(S margin) const {
    return {(-rlk::log_sigmoid(margin)), (-rlk::sigmoid((-margin)))};
  }
};

struct dpo_sigmoid {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta, S label_smoothing) const {
    const S scaled = (beta * margin);
    const S value = (((label_smoothing - S(1.0)) * rlk::log_sigmoid(scaled)) - (label_smoothing * rlk::log_sigmoid((-scaled))));
    return {value, (beta * ((label_smoothing * rlk::sigmoid(scaled)) - ((S(1.0) - label_smoothing) * rlk::sigmoid((-scaled)))))};
  }
};

struct robust {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta, S label_smoothing) const {
    const S scaled = (beta * margin);
    const S clean = (S(1.0) - label_smoothing);
    const S spread = (S(1.0) - (S(2.0) * label_smoothing));
    const S value = (((label_smoothing * rlk::log_sigmoid((-scaled))) - (clean * rlk::log_sigmoid(scaled))) / spread);
    return {value, (((-beta) * ((clean * rlk::sigmoid((-scaled))) + (label_smoothing * rlk::sigmoid(scaled)))) / spread)};
  }
};

struct exo_pair {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta, S label_smoothing) const {
    const S scaled = (beta * margin);
    const S win = rlk::sigmoid(scaled);
    const S lose = rlk::sigmoid((-scaled));
    const S log_win = rlk::log((S(1.0) - label_smoothing));
    const S log_lose = rlk::log(label_smoothing);
    const S value = ((win * (rlk::log_sigmoid(scaled) - log_win)) + (lose * (rlk::log_sigmoid((-scaled)) - log_lose)));
    return {value, (((beta * win) * lose) * ((scaled - log_win) + log_lose))};
  }
};

struct hinge {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta) const {
    const S slack = (S(1.0) - (beta * margin));
    return {rlk::where((slack <= S(0.0)), S(0.0), slack), rlk::where((slack <= S(0.0)), S(0.0), ((S(0.0) * slack) - beta))};
  }
};

struct ipo {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta) const {
    const S gap = (margin - (S(0.5) / beta));
    return {(gap * gap), (S(2.0) * gap)};
  }
};

struct kto {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta) const {
    const S tail = rlk::sigmoid(((-beta) * margin));
    return {tail, (((-beta) * tail) * rlk::sigmoid((beta * margin)))};
  }
};

struct discopop {
  template <class S>
  RLK_HD Term<S> operator()(S margin, S beta, S tau) const {
    const S scaled = (beta * margin);
    const S sharp = (scaled / tau);
    const S rest = rlk::sigmoid((-sharp));
    const S slope = (rest / tau);
    const S tail = rlk::log_sigmoid(scaled);
    const S power = rlk::exp((rlk::log_sigmoid(sharp) - scaled));
    return {(power - (tail * rest)), (beta * (((power * (slope - S(1.0))) - (rlk::sigmoid((-scaled)) * rest)) + ((tail * rlk::sigmoid(sharp)) * slope)))};
  }
};

struct alpha_divergence {
  template <class S>
  RLK_HD Term<S> operator()(S log_ratio, S alpha) const {
    const S reach = ((alpha - S(1.0)) * log_ratio);
    return {(rlk::expm1(rlk::where((reach > S(80.0)), S(80.0), reach)) / (alpha - S(1.0))), rlk::where((reach > S(80.0)), S(0.0), rlk::exp(reach))};
  }
};

struct js_divergence {
  template <class S>
  RLK_HD Term<S> operator()(S log_ratio) const {
    return {(S(0.6931471805599453) + rlk::log_sigmoid(log_ratio)), rlk::sigmoid((-log_ratio))};
  }
};

struct log_odds {
  template <class S>
  RLK_HD Term<S> operator()(S mean_logp) const {
    return {(mean_logp - rlk::log((-rlk::expm1(mean_logp)))), rlk::where((mean_logp >= S(0.0)), S(0.0), ((-S(1.0)) / rlk::expm1(mean_logp)))};
  }
};

struct nll {
  template <class S>
  RLK_HD Term<S> operator()(S logp) const {
    return {(-logp), (-S(1.0))};
  }
};

struct dft {
  template <class S>
  RLK_HD Term<S> operator()(S logp) const {
    const S prob = rlk::exp(logp);
    return {((-prob) * logp), (-prob)};
  }
};

struct value_plain {
  template <class S>
  RLK_HD Term<S> operator()(S value, S returns) const {
    const S gap = (value - returns);
    return {((S(0.5) * gap) * gap), gap};
  }
};

struct value_clip {
  template <class S>
  RLK_HD Term<S> operator()(S value, S old_value, S returns, S clip_range) const {
    const S gap = (value - old_value);
    const S free = (value - returns);
    const S held = (free + (rlk::clip(gap, (-clip_range), clip_range) - gap));
    const S keep = rlk::where(((held * held) <= (free * free)), free, (S(0.0) * held));
    return {(S(0.5) * rlk::where(((held * held) <= (free * free)), (free * free), (held * held))), keep};
  }
};

}  // namespace rlk
