// Argument checks in one vocabulary. Every message names the op and both values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace torch_pd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Messages are put together without iostreams: those look up the C++ runtime's locale, which goes
// wrong where a compiler links its own runtime statically beside torch's.
inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", part);
  text += digits;
}
template <typename Int>
  requires std::is_integral_v<Int>
inline void append(std::string& text, Int part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%lld", static_cast<long long>(part));
  text += digits;
}

template <typename... Args>
[[noreturn]] inline void fail(const char* op, const Args&... args) {
  std::string message = "torch_pd::";
  message += op;
  message += ": ";
  (append(message, args), ...);
  throw std::runtime_error(message);
}

#define TPD_CHECK(op, condition, ...)                    \
  do {                                                   \
    if (!(condition)) ::torch_pd::fail(op, __VA_ARGS__); \
  } while (0)

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    default: return "another dtype";
  }
}

inline std::string shape_name(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (i) text += ", ";
    append(text, t.size(i));
  }
  return text + "]";
}

inline std::string device_name(const Tensor& t) {
  std::string text = t.is_cuda() ? "cuda:" : t.is_cpu() ? "cpu" : "another device";
  if (t.is_cuda()) append(text, t.get_device_index());
  return text;
}

// The dispatcher passes None for a Tensor as an undefined one, of which nothing can be asked.
inline void check_given(const char* op, const char* name, const Tensor& t) {
  TPD_CHECK(op, t.defined(), name, " must be a tensor, got None");
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_given(op, name, t);
  TPD_CHECK(op, t.dim() == dim, name, " must have ", dim, " dimensions, got shape ", shape_name(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t d, int64_t size) {
  TPD_CHECK(op, t.size(d) == size, name, " size of dimension ", d, " must be ", size,
            ", got shape ", shape_name(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType type) {
  check_given(op, name, t);
  TPD_CHECK(op, t.scalar_type() == type, name, " must be ", dtype_name(type), ", got ",
            dtype_name(t.scalar_type()));
}

// float32, bfloat16 or float16.
inline void check_float(const char* op, const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  TPD_CHECK(op,
            type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
            name, " must be float32, bfloat16 or float16, got ", dtype_name(type));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other,
                             const Tensor& o) {
  check_given(op, name, t);
  check_given(op, other, o);
  TPD_CHECK(op, t.scalar_type() == o.scalar_type(), name, " is ", dtype_name(t.scalar_type()),
            " but ", other, " is ", dtype_name(o.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other,
                              const Tensor& o) {
  TPD_CHECK(op,
            t.is_cuda() == o.is_cuda() && t.is_cpu() == o.is_cpu() &&
                t.get_device_index() == o.get_device_index(),
            name, " is on ", device_name(t), " but ", other, " is on ", device_name(o));
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  TPD_CHECK(op, t.size(last) <= 1 || t.stride(last) == 1, name,
            " must be contiguous in its last dimension, got stride ", t.stride(last), " for shape ",
            shape_name(t));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  TPD_CHECK(op, t.is_contiguous(), name, " must be contiguous, got strides of another order for ",
            shape_name(t));
}

// An output: no two elements at one address.
inline void check_output(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    TPD_CHECK(op, t.size(d) <= 1 || t.stride(d) != 0, name,
              " is written and must not be expanded: stride 0 in dimension ", d, " of shape ",
              shape_name(t));
  }
}

// An index vector or table: its dtype, rank, device and a contiguous last dimension.
inline void check_index(const char* op, const char* name, const Tensor& t, ScalarType type,
                        int64_t dim, const char* other, const Tensor& o) {
  check_dtype(op, name, t, type);
  check_dim(op, name, t, dim);
  check_same_device(op, name, t, other, o);
  check_last_contiguous(op, name, t);
}

}  // namespace torch_pd
