// The C interface of loss.h, called by halfbyte/ops/loss.py.
#include "loss.h"

#include "engine.h"
#include "export.h"

using namespace hb;

// dtype is one that `hb_multiplies`; every target lies in the vocabulary.
EXPORT int hb_loss(int dtype, int64_t rows, const void* hidden, int64_t ldh, const WeightView* head,
                   const int64_t* targets, double softcap, int64_t workspace, float* nll, void* grad) {
  return guarded([&] {
    if (rows) engine->loss[dtype]->forward(rows, hidden, ldh, head, targets, softcap, workspace, nll, grad);
  });
}
