// Boxing of the functions that are registered with torch's dispatcher: m.impl("op", MOE_BOX(op)).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "torch/checks.h"

namespace moe_ops::adapter {

using OptTensor = std::optional<Tensor>;
using OptInt = std::optional<int64_t>;
using OptType = std::optional<ScalarType>;

// MOE_BOX corrects TORCH_BOX's conversions of arguments. A kernel that takes float or int would get
// the low bytes of a double or int64_t; that is a compile error. A std::string would be allocated
// in every call and never freed, and tensors after a failed allocation would leak
// (STABLE_ABI_WORKAROUND): a boxed function therefore takes the handles that cross the ABI, owns
// all of them before anything can fail, and passes std::string and Tensor on.
template <class T>
constexpr bool kBoxable =
    !std::is_same_v<std::remove_cvref_t<T>, float> &&
    !std::is_same_v<std::remove_cvref_t<T>, int> &&
    (std::is_same_v<T, std::string> || !std::is_same_v<std::remove_cvref_t<T>, std::string>);

template <class T>
struct BoxedArg {
  using Type = T;
  T value;
  explicit BoxedArg(T v) : value(v) {}
  T take() { return value; }
};

template <>
struct BoxedArg<std::string> {
  using Type = StringHandle;
  std::unique_ptr<StringOpaque, void (*)(StringHandle)> handle;
  explicit BoxedArg(StringHandle h) : handle(h, [](StringHandle s) { torch_delete_string(s); }) {}
  std::string take() {
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle.get(), &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle.get(), &data));
    return {data, length};
  }
};

template <>
struct BoxedArg<Tensor> {
  using Type = AtenTensorHandle;
  AtenTensorHandle handle;
  explicit BoxedArg(AtenTensorHandle h) : handle(h) {}
  ~BoxedArg() {
    if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
  }
  BoxedArg(const BoxedArg&) = delete;
  BoxedArg& operator=(const BoxedArg&) = delete;
  // torch passes None as an undefined tensor.
  bool missing() const {
    bool defined = false;
    aoti_torch_is_defined(handle, &defined);
    return !defined;
  }
  Tensor take() { return Tensor(std::exchange(handle, nullptr)); }
};

struct MissingTensor {
  int argument;  // counted from 1
};

template <>
struct BoxedArg<OptTensor> {
  using Type = std::optional<AtenTensorHandle>;
  BoxedArg<Tensor> tensor;
  explicit BoxedArg(Type h) : tensor(h.value_or(nullptr)) {}
  OptTensor take() {
    OptTensor out;
    if (tensor.handle != nullptr) out = tensor.take();
    return out;
  }
};

template <auto fn>
struct Boxable;
template <class R, class... Args, R (*fn)(Args...)>
struct Boxable<fn> {
  static_assert((kBoxable<Args> && ...),
                "use double, int64_t and std::string by value in registered signatures");
  static R call(typename BoxedArg<std::remove_cvref_t<Args>>::Type... args) {
    return with(BoxedArg<std::remove_cvref_t<Args>>(args)...);
  }

 private:
  static R with(BoxedArg<std::remove_cvref_t<Args>>&&... args) {
    int argument = 0;
    (require(++argument, args), ...);
    return fn(args.take()...);
  }
  template <class T>
  static void require(int argument, const BoxedArg<T>& arg) {
    if constexpr (std::is_same_v<T, Tensor>) {
      if (arg.missing()) [[unlikely]]
        throw MissingTensor{argument};
    }
  }
};

// Name of a registered function, usable as a template argument.
template <size_t N>
struct FunctionName {
  char text[N];
  consteval FunctionName(const char (&name)[N]) { std::copy_n(name, N, text); }
};

// Translates std::bad_alloc, and None passed for a tensor, to the library's error messages.
template <FunctionName name, void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void with_sentences(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  try {
    boxed(stack, num_args, num_outputs);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory();
  } catch (const MissingTensor& missing) {
    std::string op = name.text;
    if (op.ends_with("_cuda")) op.resize(op.size() - 5);
    fail(op, ": argument ", missing.argument, " must be a tensor, got None.");
  }
}
#define MOE_BOX_AS(name, fn) \
  (&::moe_ops::adapter::with_sentences<name, TORCH_BOX((&::moe_ops::adapter::Boxable<&fn>::call))>)
#define MOE_BOX(fn) MOE_BOX_AS(#fn, fn)

}  // namespace moe_ops::adapter
