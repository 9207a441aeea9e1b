// What moe_ops._C calls of the library.
#pragma once

#if defined(_WIN32)
#define MOE_OPS_API __declspec(dllexport)
#else
#define MOE_OPS_API __attribute__((visibility("default")))
#endif
