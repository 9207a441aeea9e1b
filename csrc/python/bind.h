// Makes C++ functions functions of a Python module, on the limited API of Python 3.10: one compiled
// module serves that version and every later one.
//
// A function takes and returns the types below; its parameters have names and can be given by
// position or by name, those of std::optional type can be left out.
//
//   bool, integers, double, std::string       bool, int, float, str
//   std::optional<T>                          T or None
//   std::vector<T>, std::array<T, N>          list
//   std::pair, std::tuple                     tuple
//   std::map<std::string, T>                  dict
//
// std::invalid_argument becomes ValueError, std::bad_alloc MemoryError, any other std::exception
// RuntimeError.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <concepts>
#include <cstddef>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace moe_ops::python {

// A Python error is set.
struct ErrorSet {};

// A reference that is owned.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {
    if (object == nullptr) throw ErrorSet();
  }
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object& operator=(Object&&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// ---- from C++ to Python

inline Object to_python(bool value) { return Object(PyBool_FromLong(value)); }
inline Object to_python(double value) { return Object(PyFloat_FromDouble(value)); }

template <std::integral T>
Object to_python(T value) {
  if constexpr (std::signed_integral<T>) return Object(PyLong_FromLongLong(value));
  return Object(PyLong_FromUnsignedLongLong(static_cast<unsigned long long>(value)));
}

inline Object to_python(const std::string& value) {
  return Object(PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size())));
}

template <typename T>
Object to_python(const std::optional<T>& value);
template <typename T>
Object to_python(const std::vector<T>& values);
template <typename T, size_t N>
Object to_python(const std::array<T, N>& values);
template <typename... T>
Object to_python(const std::tuple<T...>& values);
template <typename T, typename U>
Object to_python(const std::pair<T, U>& values);
template <typename T>
Object to_python(const std::map<std::string, T>& values);

template <typename Range>
Object list_of(const Range& values) {
  Object list(PyList_New(static_cast<Py_ssize_t>(values.size())));
  Py_ssize_t at = 0;
  for (const auto& value : values) PyList_SetItem(list.get(), at++, to_python(value).release());
  return list;
}

template <typename T>
Object to_python(const std::optional<T>& value) {
  if (value) return to_python(*value);
  Py_INCREF(Py_None);
  return Object(Py_None);
}

template <typename T>
Object to_python(const std::vector<T>& values) {
  return list_of(values);
}

template <typename T, size_t N>
Object to_python(const std::array<T, N>& values) {
  return list_of(values);
}

template <typename... T>
Object to_python(const std::tuple<T...>& values) {
  Object tuple(PyTuple_New(sizeof...(T)));
  Py_ssize_t at = 0;
  std::apply(
      [&](const T&... value) {
        (PyTuple_SetItem(tuple.get(), at++, to_python(value).release()), ...);
      },
      values);
  return tuple;
}

template <typename T, typename U>
Object to_python(const std::pair<T, U>& values) {
  return to_python(std::tuple<T, U>(values));
}

template <typename T>
Object to_python(const std::map<std::string, T>& values) {
  Object dict(PyDict_New());
  for (const auto& [key, value] : values) {
    const Object item = to_python(value);
    if (PyDict_SetItemString(dict.get(), key.c_str(), item.get()) < 0) throw ErrorSet();
  }
  return dict;
}

// ---- from Python to C++

template <typename T>
struct FromPython;

template <>
struct FromPython<bool> {
  static bool from(PyObject* object) {
    if (!PyBool_Check(object)) throw std::invalid_argument("a bool");
    return object == Py_True;
  }
};

template <>
struct FromPython<double> {
  static double from(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) throw std::invalid_argument("a float");
    return value;
  }
};

template <std::integral T>
struct FromPython<T> {
  static T from(PyObject* object) {
    using Widest = std::conditional_t<std::signed_integral<T>, long long, unsigned long long>;
    Widest value;
    if constexpr (std::signed_integral<T>) {
      value = PyLong_AsLongLong(object);
    } else {
      value = PyLong_AsUnsignedLongLong(object);
    }
    if (PyErr_Occurred() || value < std::numeric_limits<T>::min() ||
        value > std::numeric_limits<T>::max()) {
      throw std::invalid_argument("an int of " + std::to_string(8 * sizeof(T)) + " bits");
    }
    return static_cast<T>(value);
  }
};

template <>
struct FromPython<std::string> {
  static std::string from(PyObject* object) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) throw std::invalid_argument("a str");
    return {text, static_cast<size_t>(size)};
  }
};

template <typename T>
struct FromPython<std::optional<T>> {
  static std::optional<T> from(PyObject* object) {
    if (object == nullptr || object == Py_None) return std::nullopt;
    return FromPython<T>::from(object);
  }
};

template <typename T>
constexpr bool is_optional = false;
template <typename T>
constexpr bool is_optional<std::optional<T>> = true;

// ---- functions

// A function of the module. Lives as long as the process, as PyMethodDef must.
struct Function {
  const char* name;
  std::vector<const char*> parameters;
  std::vector<bool> optional;
  std::function<Object(PyObject* const*)> call;  // of one value a parameter, null where left out
  PyMethodDef method;
};

// The value of each parameter, borrowed.
inline std::vector<PyObject*> arguments(const Function& f, PyObject* args, PyObject* kwargs) {
  const auto fail = [&](const std::string& what) {
    PyErr_SetString(PyExc_TypeError, (f.name + std::string("() ") + what + ".").c_str());
    throw ErrorSet();
  };
  std::vector<PyObject*> values(f.parameters.size());
  const Py_ssize_t given = PyTuple_Size(args);
  if (given > static_cast<Py_ssize_t>(values.size())) {
    fail("takes " + std::to_string(values.size()) + " arguments, got " + std::to_string(given));
  }
  for (Py_ssize_t i = 0; i < given; ++i) values[i] = PyTuple_GetItem(args, i);
  Py_ssize_t named = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* value = kwargs == nullptr ? nullptr : PyDict_GetItemString(kwargs, f.parameters[i]);
    if (value != nullptr) {
      if (values[i] != nullptr) fail(std::string("got two values of ") + f.parameters[i]);
      values[i] = value;
      ++named;
    }
    if (values[i] == nullptr && !f.optional[i]) fail(std::string("lacks ") + f.parameters[i]);
  }
  if (kwargs != nullptr && PyDict_Size(kwargs) != named) fail("got a name that it does not have");
  return values;
}

inline PyObject* call_from_python(PyObject* self, PyObject* args, PyObject* kwargs) {
  try {
    const auto& f = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    return f.call(arguments(f, args, kwargs).data()).release();
  } catch (const ErrorSet&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <typename T>
std::decay_t<T> argument(const Function& f, size_t at, PyObject* value) {
  try {
    return FromPython<std::decay_t<T>>::from(value);
  } catch (const std::invalid_argument& expected) {
    const std::string message =
        f.name + std::string("() ") + f.parameters[at] + " must be " + expected.what() + ".";
    PyErr_Clear();
    PyErr_SetString(PyExc_TypeError, message.c_str());
    throw ErrorSet();
  }
}

// Adds `function` to a module under a name, with a name for each parameter.
template <typename R, typename... A, typename... Names>
void add(PyObject* module, const char* name, R (*function)(A...), Names... names) {
  static_assert(sizeof...(A) == sizeof...(Names));
  auto f = std::make_unique<Function>();
  f->name = name;
  f->parameters = {names...};
  f->optional = {is_optional<std::decay_t<A>>...};
  f->call = [function, f = f.get()](PyObject* const* values) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      // Braces: from left to right, and the first wrong one is named.
      std::tuple<std::decay_t<A>...> converted{argument<A>(*f, I, values[I])...};
      if constexpr (std::is_void_v<R>) {
        std::apply(function, std::move(converted));
        return to_python(std::optional<bool>());
      } else {
        return to_python(std::apply(function, std::move(converted)));
      }
    }(std::index_sequence_for<A...>());
  };
  f->method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_from_python)),
               METH_VARARGS | METH_KEYWORDS, nullptr};
  const Object self(PyCapsule_New(f.get(), nullptr, nullptr));
  const Object module_name(PyModule_GetNameObject(module));
  const Object object(PyCFunction_NewEx(&f->method, self.get(), module_name.get()));
  f.release();
  if (PyObject_SetAttrString(module, name, object.get()) < 0) throw ErrorSet();
}

// Other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace moe_ops::python
