// Whole lists of parameters updated in one call.
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>

extern "C" {

// All lists are equally long, on one device, of one kind (but `steps`, which is f32).
int attn_fused_adamw(List* params, List* grads, List* m, List* v, List* steps, double lr, double beta1, double beta2,
                     double weight_decay, double eps, char** err) {
  return attempt(err, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_add_(*steps, 1.0);
    at::_fused_adamw_(*params, *grads, *m, *v, {}, *steps, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  });
}

// The 2-norm of each tensor as a scalar tensor on its device; halves are accumulated in f32.
int attn_norms(const List* tensors, List* norms, char** err) {
  return attempt(err, [&] {
    at::NoGradGuard no_grad;
    norms->clear();
    for (const auto& tensor : *tensors) {
      auto kind = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      norms->push_back(at::_foreach_norm(at::TensorList(tensor), 2, kind)[0]);
    }
  });
}

int attn_scale(List* tensors, double factor, char** err) {
  return attempt(err, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(*tensors, factor);
  });
}

}  // extern "C"
