// The vocabulary projection and the cross-entropy, forward and backward in one: what Python hands over.
#pragma once

#include "linear.h"

namespace hb {

struct LossKernels {
  // nll [N] = log sum exp(logits) - logits[target], logits = hidden head^T, soft-capped where softcap > 0.
  // grad [N x D], or null: the gradient of the sum of nll by hidden. `workspace`: bytes for a stretch's exponentials.
  void (*forward)(int64_t N, const void* hidden, int64_t ldh, const WeightView* head, const int64_t* targets,
                  double softcap, int64_t workspace, float* nll, void* grad);
};

}  // namespace hb
