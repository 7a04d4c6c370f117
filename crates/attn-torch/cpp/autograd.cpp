// Gradients: operations whose backward pass is written in Rust, and gradients for given output gradients.
#include "shim.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/custom_class.h>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A Rust object and how to call it. A callback that fails returns 1 and leaves a message, as `attempt` does.
struct Callbacks {
  void* data;
  int (*forward)(void* data, const List* inputs, List* outputs, List* saved, char** err);
  int (*backward)(void* data, const List* saved, const List* grads, List* input_grads, char** err);
  void (*drop)(void* data);
};

namespace {

// Rides in the graph node; frees the Rust object with it. A CustomClassHolder, so that an IValue can carry it.
struct Owner : torch::CustomClassHolder {
  explicit Owner(Callbacks callbacks) : callbacks(callbacks) {}
  ~Owner() override { callbacks.drop(callbacks.data); }
  Callbacks callbacks;
};

void check(int failed, char* err) {
  if (!failed) return;
  std::string message = err ? err : "a Rust callback failed without a message";
  free(err);
  throw std::runtime_error(message);
}

struct RustFunction : torch::autograd::Function<RustFunction> {
  // `inputs` has to be a TensorList: a std::vector would not be taken for variables, and nothing would need a gradient.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, c10::intrusive_ptr<Owner> owner) {
    List given = inputs.vec();
    List outputs, saved;
    char* err = nullptr;
    int failed = owner->callbacks.forward(owner->callbacks.data, &given, &outputs, &saved, &err);
    check(failed, err);

    variable_list no_gradient;
    for (const auto& out : outputs) {
      if (!at::isFloatingType(out.scalar_type()) && !at::isComplexType(out.scalar_type())) no_gradient.push_back(out);
    }
    ctx->mark_non_differentiable(no_gradient);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["n_inputs"] = static_cast<int64_t>(given.size());
    ctx->saved_data["owner"] = c10::IValue::make_capsule(std::move(owner));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    List saved = ctx->get_saved_variables();
    auto n_inputs = static_cast<size_t>(ctx->saved_data["n_inputs"].toInt());
    auto capsule = ctx->saved_data["owner"].toCapsule();
    const Callbacks& callbacks = static_cast<Owner*>(capsule.get())->callbacks;

    List input_grads;
    char* err = nullptr;
    int failed = callbacks.backward(callbacks.data, &saved, &grads, &input_grads, &err);
    check(failed, err);
    if (input_grads.size() != n_inputs) {
      throw std::runtime_error("backward gave " + std::to_string(input_grads.size()) + " gradients for " +
                               std::to_string(n_inputs) + " inputs");
    }
    input_grads.emplace_back();  // The owner is an argument of forward too.
    return input_grads;
  }
};

}  // namespace

extern "C" {

// Owns `callbacks.data` from here on, also when it fails.
int attn_apply(const List* inputs, Callbacks callbacks, List* outputs, char** err) {
  return attempt(err, [&] {
    auto owner = c10::make_intrusive<Owner>(callbacks);
    *outputs = RustFunction::apply(at::TensorList(*inputs), std::move(owner));
  });
}

int attn_backward(const List* outputs, const List* grads, int keep_graph, int create_graph, char** err) {
  return attempt(err, [&] { torch::autograd::backward(*outputs, *grads, keep_graph != 0, create_graph != 0); });
}

int attn_grad(const List* outputs, const List* grads, const List* inputs, int keep_graph, int create_graph,
              List* input_grads, char** err) {
  return attempt(err, [&] {
    *input_grads = torch::autograd::grad(*outputs, *inputs, *grads, keep_graph != 0, create_graph != 0,
                                         /*allow_unused=*/true);
  });
}

// The gradients that backward passes left in `leaves`, undefined where there is none; the leaves then have none.
int attn_take_grads(const List* leaves, List* grads, char** err) {
  return attempt(err, [&] {
    grads->clear();
    for (const at::Tensor& leaf : *leaves) {
      grads->push_back(leaf.grad());
      leaf.mutable_grad().reset();
    }
  });
}

// False inside a backward pass that collects the gradients of chosen inputs only: a nested backward pass
// would then add gradients to parameters that nobody asked for, and the chosen inputs would miss theirs.
int attn_nested_backward_allowed(int* allowed, char** err) {
  return attempt(err, [&] { *allowed = torch::autograd::Engine::get_default_engine().is_checkpoint_valid(); });
}

}  // extern "C"
