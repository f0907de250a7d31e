// As much of CUDA as csrc/ uses, on the CPU, one thread at a time: every CUDA thread is a coroutine that runs until it
// waits at a barrier. A barrier that a thread of the block never reaches ends the program; shared memory starts out as NaN,
// and a kernel that writes beyond it fails. The device is described by emulate().

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __restrict__
#define __align__(n)
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half(float x) { return {_Float16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101;
constexpr int cudaDevAttrComputeCapabilityMajor = 0, cudaDevAttrMultiProcessorCount = 1,
              cudaDevAttrMaxSharedMemoryPerBlockOptin = 2;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaLaunchAttributeClusterDimension = 0;
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

inline int emulated_device[3] = {9, 4, 227 * 1024};
inline int emulated_largest_cluster = 0;
inline size_t emulated_largest_shared = 0;
extern "C" void emulate(int major, int multiprocessors, int shared_bytes) {
  emulated_device[0] = major;
  emulated_device[1] = multiprocessors;
  emulated_device[2] = shared_bytes;
  emulated_largest_cluster = 0;
  emulated_largest_shared = 0;
}
extern "C" int largest_cluster() { return emulated_largest_cluster; }
extern "C" int64_t largest_shared() { return int64_t(emulated_largest_shared); }

inline int emulated_current = -1;
inline int cudaSetDevice(int id) { return (emulated_current = id) < 0 ? cudaErrorInvalidDevice : 0; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int id) {
  if (id != emulated_current) return cudaErrorInvalidDevice;
  *value = emulated_device[attribute];
  return 0;
}
extern "C" int current_device() { return emulated_current; }
inline int cudaFuncSetAttribute(const void*, int, int) { return 0; }
inline const char* cudaGetErrorString(int) { return "an error"; }

enum class At { running, block_barrier, cluster_barrier, finished };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned block, index;  // block: of the cluster
  At at;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline std::vector<std::vector<unsigned char>> emulated_shared;  // of the cluster's blocks
inline unsigned char* shared_memory;                             // of the running thread's block
inline Thread* emulated_running;
inline ucontext_t emulated_scheduler;
inline void (*emulated_body)(void*);
inline void* emulated_arguments;

inline void emulated_wait(At at) {
  emulated_running->at = at;
  swapcontext(&emulated_running->context, &emulated_scheduler);
}
inline void __syncthreads() { emulated_wait(At::block_barrier); }
inline void emulated_cluster_barrier() { emulated_wait(At::cluster_barrier); }
inline const float* emulated_of_rank(const float* pointer, int rank) {
  const size_t offset = reinterpret_cast<const unsigned char*>(pointer) - shared_memory;
  return reinterpret_cast<const float*>(emulated_shared[rank].data() + offset);
}
inline void emulated_start() {
  emulated_body(emulated_arguments);
  emulated_wait(At::finished);
}

// Runs the threads of a cluster's blocks to their ends.
inline void emulated_run(std::vector<Thread>& threads, dim3 first_block) {
  const auto count = [&](At at, int block) {
    size_t n = 0;
    for (const Thread& t : threads) n += t.at == at && (block < 0 || int(t.block) == block);
    return n;
  };
  for (Thread& t : threads) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = 64 * 1024;
    t.context.uc_link = nullptr;
    makecontext(&t.context, emulated_start, 0);
    t.at = At::running;
  }
  while (count(At::finished, -1) < threads.size()) {
    for (Thread& t : threads) {
      if (t.at != At::running) continue;
      threadIdx = dim3(t.index);
      blockIdx = dim3(first_block.x + t.block, first_block.y);
      shared_memory = emulated_shared[t.block].data();
      emulated_running = &t;
      swapcontext(&emulated_scheduler, &t.context);
    }
    bool moved = false;
    for (unsigned block = 0; block < emulated_shared.size(); block++) {
      if (count(At::block_barrier, block) != blockDim.x) continue;
      moved = true;
      for (Thread& t : threads)
        if (t.block == block) t.at = At::running;
    }
    if (count(At::cluster_barrier, -1) == threads.size()) {
      moved = true;
      for (Thread& t : threads) t.at = At::running;
    }
    if (!moved && count(At::finished, -1) < threads.size()) {
      fprintf(stderr, "a barrier that not every thread reaches\n");
      abort();
    }
  }
}

template <typename... Parameters, typename... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulated_body = [](void* body) { (*static_cast<decltype(call)*>(body))(); };
  emulated_arguments = &call;
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  emulated_largest_cluster = emulated_largest_cluster > int(cluster) ? emulated_largest_cluster : int(cluster);
  emulated_largest_shared = config->dynamicSmemBytes > emulated_largest_shared ? config->dynamicSmemBytes : emulated_largest_shared;
  if (int64_t(config->dynamicSmemBytes) > emulated_device[2] || config->gridDim.x % cluster) return cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  std::vector<Thread> threads(size_t(cluster) * blockDim.x);
  for (size_t i = 0; i < threads.size(); i++) {
    threads[i].stack = std::make_unique<char[]>(64 * 1024);
    threads[i].block = unsigned(i / blockDim.x);
    threads[i].index = unsigned(i % blockDim.x);
  }
  for (unsigned y = 0; y < gridDim.y; y++) {
    for (unsigned x = 0; x < gridDim.x; x += cluster) {
      const size_t guard = 4096;
      emulated_shared.assign(cluster, std::vector<unsigned char>(config->dynamicSmemBytes + guard, 0xff));
      emulated_run(threads, dim3(x, y));
      for (const auto& bytes : emulated_shared)
        for (size_t i = config->dynamicSmemBytes; i < bytes.size(); i++)
          if (bytes[i] != 0xff) return cudaErrorInvalidValue;
    }
  }
  return 0;
}
