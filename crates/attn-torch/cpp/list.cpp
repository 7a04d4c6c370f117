// Lists of tensors, and single tensors laid over memory that Rust owns.
#include "shim.h"

#include <ATen/ops/from_blob.h>

extern "C" {

List* attn_list_new() { return new List(); }

void attn_list_free(List* list) { delete list; }

// A null `tensor` is kept as an undefined one.
int attn_list_push(List* list, const at::Tensor* tensor, char** err) {
  return attempt(err, [&] { list->push_back(tensor ? *tensor : at::Tensor()); });
}

size_t attn_list_len(const List* list) { return list->size(); }

// The tensor at `index`, to be freed by the caller; null where it is undefined.
int attn_list_get(const List* list, size_t index, at::Tensor** out, char** err) {
  return attempt(err, [&] {
    const at::Tensor& tensor = list->at(index);
    *out = tensor.defined() ? new at::Tensor(tensor) : nullptr;
  });
}

// A contiguous tensor over `data`. `drop(owner)` runs when the last tensor over it is gone; on failure too.
int attn_from_blob(void* data, const int64_t* size, size_t n_dims, int kind, void* owner, void (*drop)(void*),
                   at::Tensor** out, char** err) {
  return attempt(err, [&] {
    std::shared_ptr<void> guard(owner, drop);
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    auto tensor = at::from_blob(data, at::IntArrayRef(size, n_dims), [guard](void*) {}, options);
    *out = new at::Tensor(std::move(tensor));
  });
}

}  // extern "C"
