// Group normalisation and SiLU of channels-last activations, forward and backward: kernels/group_norm_silu.py states the
// formulas, and this is the same in CUDA C++ for compute capability 8.x and 9.0. x is [samples, pixels, channels].
//
// What Triton cannot do: a slab (the pixels of one sample, for a bundle of neighbouring groups) is split over the blocks
// of a thread block cluster, each keeps its pixels in shared memory, and they exchange sums there. So every input is read
// once however large the slab: 4 bytes an element forward and 6 backward in half precision. Without clusters (8.x) one
// block has the whole slab; if that does not fit into its shared memory it is read again, backwards, mostly from L2.
//
// Every thread owns V neighbouring channels (16 bytes) of every R-th pixel, from the load to the store, so what it parks
// in shared memory needs no synchronisation. All sums have a fixed order; there are no atomics.

#ifdef FASTGRPO_ON_CPU
#include "cuda_on_cpu.h"
#define DYNAMIC_SHARED_MEMORY
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYNAMIC_SHARED_MEMORY extern __shared__ __align__(16) unsigned char shared_memory[];
#endif

#include <cstdint>
#include <type_traits>

namespace {

constexpr int kThreads = 256;
constexpr int kMaxWidth = 128;                  // channels of a bundle of several groups
constexpr int kMinRowBytes = 64;                // two sectors of memory
constexpr int kClusterBytes = 64 * 1024;        // per block: three of them fit on a multiprocessor of an H100
constexpr int kMaxCluster = 8;                  // the largest that every device with clusters allows
constexpr int64_t kSlabBytes = 192 * 1024;      // one for each multiprocessor stays in L2

struct Shape {
  int64_t pixels, channels;
  int groups, group_channels;
  int bundle, width;          // groups and channels of a slab
  int lanes, rows;            // threads side by side in a row of a slab, rows at a time
  int cluster;                // blocks of a slab
  int64_t rank_pixels;        // pixels of a block, fewer in the last
  float eps;
  bool silu, keep, float_weight;  // keep: in shared memory between the two passes
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float& y) { y = x; }
__device__ void from_float(float x, __half& y) { y = __float2half(x); }
__device__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }

template <typename T>
__device__ float load_weight(const void* weight, int64_t i, bool is_float) {
  return is_float ? static_cast<const float*>(weight)[i] : to_float(static_cast<const T*>(weight)[i]);
}

// The fast exponential and division are good to about 2^-20, which half precision does not see.
template <typename T>
__device__ float sigmoid(float z) {
  if constexpr (sizeof(T) == 4) {
    return 1.0f / (1.0f + expf(-z));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-z));
  }
}

// Blocks of a cluster: wait for each other, and read each other's shared memory.
__device__ void cluster_barrier() {
#if defined(FASTGRPO_ON_CPU)
  emulated_cluster_barrier();
#elif __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

__device__ const float* of_rank(const float* shared, int rank) {
#if defined(FASTGRPO_ON_CPU)
  return emulated_of_rank(shared, rank);
#elif __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

__device__ int64_t pixels_of_rank(const Shape& s, int rank) {
  const int64_t left = s.pixels - rank * s.rank_pixels;
  return left < 0 ? 0 : left < s.rank_pixels ? left : s.rank_pixels;
}

// Where a thread stands. first: its first channel. lane * V is that within the slab, row its first pixel in the block.
struct Place {
  int rank, lane, row;
  int64_t sample, bundle, first, pixels;
  int64_t slab;  // offset of (the block's first pixel, first) in x
  bool works;
};

template <int V>
__device__ Place place(const Shape& s) {
  Place p;
  p.rank = blockIdx.x % s.cluster;
  p.bundle = blockIdx.x / s.cluster;
  p.sample = blockIdx.y;
  p.lane = threadIdx.x % s.lanes;
  p.row = threadIdx.x / s.lanes;
  p.works = p.row < s.rows;
  p.pixels = pixels_of_rank(s, p.rank);
  p.first = p.bundle * s.width + p.lane * V;
  p.slab = (p.sample * s.pixels + p.rank * s.rank_pixels) * s.channels + p.first;
  return p;
}

// One number per row and channel, for rows above the middle: what a step of a tree over rows passes down.
__device__ int64_t tree_floats(int rows, int width) { return int64_t((rows + 1) / 2) * width; }

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(T* __restrict__ y, float* __restrict__ mean_out,
                                                           float* __restrict__ rstd_out, const T* __restrict__ x,
                                                           const T* __restrict__ temb, const void* __restrict__ weight,
                                                           const void* __restrict__ bias, Shape s) {
  using P = Pack<T, V>;
  DYNAMIC_SHARED_MEMORY
  const Place p = place<V>(s);

  float* tree_mean = reinterpret_cast<float*>(shared_memory);
  float* tree_m2 = tree_mean + tree_floats(s.rows, s.width);
  float* tree_count = tree_m2 + tree_floats(s.rows, s.width);
  float* channel_mean = tree_count + s.rows;
  float* channel_m2 = channel_mean + s.width;
  float* block_mean = channel_m2 + s.width;  // of a group in this block's pixels; other blocks read it
  float* block_m2 = block_mean + s.bundle;
  float* group_mean = block_m2 + s.bundle;
  float* group_rstd = group_mean + s.bundle;
  const int64_t floats = group_rstd + s.bundle - tree_mean;
  P* kept = reinterpret_cast<P*>(shared_memory + (floats * sizeof(float) + 15) / 16 * 16);

  float shift[V];
  for (int v = 0; v < V; v++) shift[v] = temb ? to_float(temb[p.sample * s.channels + p.first + v]) : 0.0f;

  // Welford, each channel by itself.
  float count = 0.0f, mean[V], m2[V];
  for (int v = 0; v < V; v++) mean[v] = m2[v] = 0.0f;
  if (p.works) {
#pragma unroll 4
    for (int64_t row = p.row; row < p.pixels; row += s.rows) {
      const P pack = *reinterpret_cast<const P*>(x + p.slab + row * s.channels);
      if (s.keep) kept[row * s.lanes + p.lane] = pack;
      count += 1.0f;
      const float share = __fdividef(1.0f, count);
      for (int v = 0; v < V; v++) {
        const float value = to_float(pack.value[v]) + shift[v];
        const float delta = value - mean[v];
        mean[v] += delta * share;
        m2[v] += delta * (value - mean[v]);
      }
    }
  }

  // Chan's formula up a tree: the upper half of the rows joins the lower half.
  for (int active = s.rows; active > 1;) {
    const int half = (active + 1) / 2;
    if (p.row >= half && p.row < active) {
      const int slot = (p.row - half) * s.width + p.lane * V;
      for (int v = 0; v < V; v++) {
        tree_mean[slot + v] = mean[v];
        tree_m2[slot + v] = m2[v];
      }
      if (p.lane == 0) tree_count[p.row - half] = count;
    }
    __syncthreads();
    if (p.row + half < active) {
      const float other = tree_count[p.row], total = count + other;
      if (other > 0.0f) {
        const float share = other / total;
        for (int v = 0; v < V; v++) {
          const float delta = tree_mean[p.row * s.width + p.lane * V + v] - mean[v];
          mean[v] += delta * share;
          m2[v] += tree_m2[p.row * s.width + p.lane * V + v] + delta * delta * count * share;
        }
        count = total;
      }
    }
    __syncthreads();
    active = half;
  }
  if (p.row == 0) {
    for (int v = 0; v < V; v++) {
      channel_mean[p.lane * V + v] = mean[v];
      channel_m2[p.lane * V + v] = m2[v];
    }
  }
  __syncthreads();

  // Channels to groups: all have as many pixels. The second sum takes out what rounding left in the first.
  for (int g = threadIdx.x; g < s.bundle; g += blockDim.x) {
    const float* means = channel_mean + g * s.group_channels;
    float sum = 0.0f, rest = 0.0f, spread = 0.0f;
    for (int c = 0; c < s.group_channels; c++) sum += means[c] - means[0];
    const float guess = means[0] + sum / s.group_channels;
    for (int c = 0; c < s.group_channels; c++) rest += means[c] - guess;
    const float exact = guess + rest / s.group_channels;
    for (int c = 0; c < s.group_channels; c++) {
      const float delta = means[c] - exact;
      spread += channel_m2[g * s.group_channels + c] + delta * delta * p.pixels;
    }
    block_mean[g] = exact;
    block_m2[g] = spread;
  }
  cluster_barrier();

  // Blocks of the cluster: all of them compute the same.
  for (int g = threadIdx.x; g < s.bundle; g += blockDim.x) {
    const float base = of_rank(block_mean, 0)[g];
    float sum = 0.0f, spread = 0.0f;
    for (int rank = 0; rank < s.cluster; rank++) sum += (of_rank(block_mean, rank)[g] - base) * pixels_of_rank(s, rank);
    const float whole = base + sum / s.pixels;
    for (int rank = 0; rank < s.cluster; rank++) {
      const float delta = of_rank(block_mean, rank)[g] - whole;
      spread += of_rank(block_m2, rank)[g] + delta * delta * pixels_of_rank(s, rank) * s.group_channels;
    }
    group_mean[g] = whole;
    group_rstd[g] = 1.0f / sqrtf(spread / (float(s.pixels) * s.group_channels) + s.eps);
    if (p.rank == 0) {
      mean_out[p.sample * s.groups + p.bundle * s.bundle + g] = group_mean[g];
      rstd_out[p.sample * s.groups + p.bundle * s.bundle + g] = group_rstd[g];
    }
  }
  cluster_barrier();  // also: nobody leaves while others still read its shared memory
  if (!p.works || p.row >= p.pixels) return;

  float rstd[V], w[V], b[V];
  for (int v = 0; v < V; v++) {
    const int g = (p.lane * V + v) / s.group_channels;
    mean[v] = group_mean[g];
    rstd[v] = group_rstd[g];
    w[v] = load_weight<T>(weight, p.first + v, s.float_weight);
    b[v] = load_weight<T>(bias, p.first + v, s.float_weight);
  }
  const int64_t last = p.row + (p.pixels - 1 - p.row) / s.rows * s.rows;
#pragma unroll 4
  for (int64_t row = last; row >= 0; row -= s.rows) {
    const P pack = s.keep ? kept[row * s.lanes + p.lane] : *reinterpret_cast<const P*>(x + p.slab + row * s.channels);
    P out;
    for (int v = 0; v < V; v++) {
      const float z = (to_float(pack.value[v]) + shift[v] - mean[v]) * rstd[v] * w[v] + b[v];
      from_float(s.silu ? z * sigmoid<T>(z) : z, out.value[v]);
    }
    *reinterpret_cast<P*>(y + p.slab + row * s.channels) = out;
  }
}

// shares: [2, samples, channels] float32, every sample's part of dweight and of dbias.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(T* __restrict__ dx, T* __restrict__ dtemb, float* __restrict__ shares, const T* __restrict__ dy,
                    const T* __restrict__ x, const T* __restrict__ temb, const void* __restrict__ weight,
                    const void* __restrict__ bias, const float* __restrict__ mean_in, const float* __restrict__ rstd_in,
                    Shape s) {
  using P = Pack<T, V>;
  DYNAMIC_SHARED_MEMORY
  const Place p = place<V>(s);

  const int64_t tree = tree_floats(s.rows, s.width);
  float* tree_sums = reinterpret_cast<float*>(shared_memory);  // three, as everywhere: dz, dz * xhat, xhat
  float* block_sums = tree_sums + 3 * tree;                    // [3, width]; other blocks read it
  float* sums = block_sums + 3 * s.width;                      // [3, width], of the cluster
  float* group_mean_dz = sums + 3 * s.width;
  float* group_mean_dz_xhat = group_mean_dz + s.bundle;
  const int64_t floats = group_mean_dz_xhat + s.bundle - tree_sums;
  P* kept_x = reinterpret_cast<P*>(shared_memory + (floats * sizeof(float) + 15) / 16 * 16);
  P* kept_dy = kept_x + s.rank_pixels * s.lanes;

  float shift[V], rstd[V], w[V], b[V], sum[3][V];
  for (int v = 0; v < V; v++) {
    const int64_t channel = p.first + v, group = p.sample * s.groups + channel / s.group_channels;
    shift[v] = (temb ? to_float(temb[p.sample * s.channels + channel]) : 0.0f);
    rstd[v] = rstd_in[group];
    w[v] = load_weight<T>(weight, channel, s.float_weight);
    b[v] = load_weight<T>(bias, channel, s.float_weight);
    sum[0][v] = sum[1][v] = sum[2][v] = 0.0f;
  }
  float mean[V];
  for (int v = 0; v < V; v++) mean[v] = mean_in[p.sample * s.groups + (p.first + v) / s.group_channels];

  auto gradient = [&](float value, float upstream, int v, float& xhat, float& dz) {
    xhat = (value + shift[v] - mean[v]) * rstd[v];
    dz = upstream;
    if (s.silu) {
      const float z = xhat * w[v] + b[v], sigma = sigmoid<T>(z);
      dz = upstream * sigma * (1.0f + z * (1.0f - sigma));
    }
  };

  if (p.works) {
#pragma unroll 2
    for (int64_t row = p.row; row < p.pixels; row += s.rows) {
      const P pack_x = *reinterpret_cast<const P*>(x + p.slab + row * s.channels);
      const P pack_dy = *reinterpret_cast<const P*>(dy + p.slab + row * s.channels);
      if (s.keep) {
        kept_x[row * s.lanes + p.lane] = pack_x;
        kept_dy[row * s.lanes + p.lane] = pack_dy;
      }
      for (int v = 0; v < V; v++) {
        float xhat, dz;
        gradient(to_float(pack_x.value[v]), to_float(pack_dy.value[v]), v, xhat, dz);
        sum[0][v] += dz;
        sum[1][v] += dz * xhat;
        sum[2][v] += xhat;
      }
    }
  }

  for (int active = s.rows; active > 1;) {
    const int half = (active + 1) / 2;
    if (p.row >= half && p.row < active) {
      for (int k = 0; k < 3; k++)
        for (int v = 0; v < V; v++) tree_sums[k * tree + (p.row - half) * s.width + p.lane * V + v] = sum[k][v];
    }
    __syncthreads();
    if (p.row + half < active) {
      for (int k = 0; k < 3; k++)
        for (int v = 0; v < V; v++) sum[k][v] += tree_sums[k * tree + p.row * s.width + p.lane * V + v];
    }
    __syncthreads();
    active = half;
  }
  if (p.row == 0) {
    for (int k = 0; k < 3; k++)
      for (int v = 0; v < V; v++) block_sums[k * s.width + p.lane * V + v] = sum[k][v];
  }
  cluster_barrier();

  for (int i = threadIdx.x; i < 3 * s.width; i += blockDim.x) {
    float total = 0.0f;
    for (int rank = 0; rank < s.cluster; rank++) total += of_rank(block_sums, rank)[i];
    sums[i] = total;
  }
  cluster_barrier();  // also: nobody leaves while others still read its shared memory

  const float n = float(s.pixels) * s.group_channels;
  for (int g = threadIdx.x; g < s.bundle; g += blockDim.x) {
    float dz = 0.0f, dz_xhat = 0.0f;
    for (int c = g * s.group_channels; c < (g + 1) * s.group_channels; c++) {
      const float scale = load_weight<T>(weight, p.bundle * s.width + c, s.float_weight);
      dz += scale * sums[c];
      dz_xhat += scale * sums[s.width + c];
    }
    group_mean_dz[g] = dz / n;
    group_mean_dz_xhat[g] = dz_xhat / n;
  }
  __syncthreads();
  if (!p.works) return;

  float mean_dz[V], mean_dz_xhat[V];
  for (int v = 0; v < V; v++) {
    const int c = p.lane * V + v, g = c / s.group_channels;
    mean_dz[v] = group_mean_dz[g];
    mean_dz_xhat[v] = group_mean_dz_xhat[g];
    if (p.rank == 0 && p.row == 0) {
      const int64_t channel = p.sample * s.channels + p.first + v;
      shares[channel] = sums[s.width + c];
      shares[gridDim.y * s.channels + channel] = sums[c];
      if (dtemb)
        from_float(rstd[v] * (w[v] * sums[c] - s.pixels * mean_dz[v] - mean_dz_xhat[v] * sums[2 * s.width + c]),
                   dtemb[channel]);
    }
  }
  if (p.row >= p.pixels) return;
  const int64_t last = p.row + (p.pixels - 1 - p.row) / s.rows * s.rows;
#pragma unroll 2
  for (int64_t row = last; row >= 0; row -= s.rows) {
    P pack_x, pack_dy, out;
    if (s.keep) {
      pack_x = kept_x[row * s.lanes + p.lane];
      pack_dy = kept_dy[row * s.lanes + p.lane];
    } else {
      pack_x = *reinterpret_cast<const P*>(x + p.slab + row * s.channels);
      pack_dy = *reinterpret_cast<const P*>(dy + p.slab + row * s.channels);
    }
    for (int v = 0; v < V; v++) {
      float xhat, dz;
      gradient(to_float(pack_x.value[v]), to_float(pack_dy.value[v]), v, xhat, dz);
      from_float(rstd[v] * (w[v] * dz - mean_dz[v] - xhat * mean_dz_xhat[v]), out.value[v]);
    }
    *reinterpret_cast<P*>(dx + p.slab + row * s.channels) = out;
  }
}

// dweight (blockIdx.y 0) and dbias (1) [channels] from shares. Threads: 32 channels by 8.
constexpr int kReduceRows = kThreads / 32;

template <typename W>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(W* __restrict__ dweight, W* __restrict__ dbias, const float* __restrict__ shares, int64_t samples,
                  int64_t channels) {
  DYNAMIC_SHARED_MEMORY
  float* sums = reinterpret_cast<float*>(shared_memory);
  const int column = threadIdx.x % 32, row = threadIdx.x / 32;
  const int64_t channel = int64_t(blockIdx.x) * 32 + column;
  float sum = 0.0f;
  if (channel < channels) {
    for (int64_t n = row; n < samples; n += kReduceRows) sum += shares[(blockIdx.y * samples + n) * channels + channel];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row == 0 && channel < channels) {
    for (int r = 1; r < kReduceRows; r++) sum += sums[r * 32 + column];
    from_float(sum, (blockIdx.y == 0 ? dweight : dbias)[channel]);
  }
}

struct Device {
  int major, multiprocessors, shared_bytes;
};

// The runtime in this library keeps a current device of its own, whichever PyTorch's is: id becomes it.
cudaError_t describe(Device& device, int id) {
  cudaError_t error = cudaSetDevice(id);
  if (!error) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, id);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (!error) error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return error;
}

// How a shape is cut up. tensors: as many inputs as are read twice. Returns V, and in `shared` the bytes a block needs;
// 0 if one row is too wide for a block.
int plan(Shape& s, const Device& device, int64_t samples, int itemsize, int tensors, bool aligned, size_t& shared) {
  const bool clusters = device.major >= 9;
  const int widest = aligned ? 16 / itemsize : 1;
  s.bundle = 1;
  while (s.groups % (2 * s.bundle) == 0 && 2 * s.bundle * s.group_channels <= kMaxWidth) {
    const int width = s.bundle * s.group_channels;
    if (width * itemsize >= kMinRowBytes && width % widest == 0) break;
    if (!clusters && 2 * width * s.pixels * itemsize > kSlabBytes) break;
    s.bundle *= 2;
  }
  s.width = s.bundle * s.group_channels;
  int v = widest;
  while (s.width % v) v = v > 2 && itemsize == 2 ? 2 : 1;
  s.lanes = s.width / v;
  if (s.lanes > kThreads) return 0;
  s.rows = kThreads / s.lanes;
  if (s.rows > s.pixels) s.rows = int(s.pixels);

  const int64_t row_bytes = int64_t(s.width) * itemsize * tensors;
  s.cluster = 1;
  while (clusters && s.cluster < kMaxCluster) {
    // A block has at least a few rows for every thread, and as many as share a multiprocessor with others' rows.
    const bool many_pixels = s.pixels / (2 * s.cluster) >= 4 * s.rows;
    const bool few_blocks = samples * (s.groups / s.bundle) * s.cluster < 2 * device.multiprocessors;
    if (s.pixels * row_bytes / s.cluster <= kClusterBytes && !(many_pixels && few_blocks)) break;
    s.cluster *= 2;
  }
  s.rank_pixels = (s.pixels + s.cluster - 1) / s.cluster;
  const int64_t tree = int64_t((s.rows + 1) / 2) * s.width;
  const int64_t floats = tensors == 1 ? 2 * tree + s.rows + 2 * s.width + 4 * s.bundle : 3 * tree + 6 * s.width + 2 * s.bundle;
  const int64_t scratch = (floats * 4 + 15) / 16 * 16;
  s.keep = scratch + s.rank_pixels * row_bytes <= device.shared_bytes;
  shared = size_t(scratch + (s.keep ? s.rank_pixels * row_bytes : 0));
  return int64_t(shared) <= device.shared_bytes ? v : 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, int cluster, void* stream,
                   Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename T, int V>
cudaError_t forward(void* y, float* mean, float* rstd, const void* x, const void* temb, const void* weight,
                    const void* bias, const Shape& s, dim3 grid, size_t shared, void* stream) {
  return launch(forward_kernel<T, V>, grid, shared, s.cluster, stream, static_cast<T*>(y), mean, rstd,
                static_cast<const T*>(x), static_cast<const T*>(temb), weight, bias, s);
}

template <typename T, int V>
cudaError_t backward(void* dx, void* dtemb, float* shares, const void* dy, const void* x, const void* temb,
                     const void* weight, const void* bias, const float* mean, const float* rstd, const Shape& s,
                     dim3 grid, size_t shared, void* stream) {
  return launch(backward_kernel<T, V>, grid, shared, s.cluster, stream, static_cast<T*>(dx), static_cast<T*>(dtemb),
                shares, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(temb), weight, bias,
                mean, rstd, s);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Shape make_shape(int64_t pixels, int64_t channels, int64_t groups, float eps, int64_t silu, int64_t weight_dtype) {
  Shape s{};
  s.pixels = pixels;
  s.channels = channels;
  s.groups = int(groups);
  s.group_channels = int(channels / groups);
  s.eps = eps;
  s.silu = silu != 0;
  s.float_weight = weight_dtype == 0;
  return s;
}

// f<T, V> for dtype 0 float, 1 half, 2 bfloat16.
#define DISPATCH(f, dtype, v, ...)                                                     \
  ((dtype) == 0 ? ((v) == 4 ? f<float, 4>(__VA_ARGS__) : f<float, 1>(__VA_ARGS__))     \
   : (dtype) == 1                                                                      \
       ? ((v) == 8 ? f<__half, 8>(__VA_ARGS__) : (v) == 2 ? f<__half, 2>(__VA_ARGS__) : f<__half, 1>(__VA_ARGS__)) \
       : ((v) == 8   ? f<__nv_bfloat16, 8>(__VA_ARGS__)                                \
          : (v) == 2 ? f<__nv_bfloat16, 2>(__VA_ARGS__)                                \
                     : f<__nv_bfloat16, 1>(__VA_ARGS__)))

}  // namespace

// Both return a CUDA error code, 0 if the kernels were launched. temb and dtemb may be null. dtype: 0 float, 1 half,
// 2 bfloat16; weight_dtype, of weight, bias, dweight and dbias: 0 or dtype. id: of the device that the stream is of.

extern "C" int fastgrpo_group_norm_silu_forward(void* y, float* mean, float* rstd, const void* x, const void* temb,
                                                const void* weight, const void* bias, int64_t samples, int64_t pixels,
                                                int64_t channels, int64_t groups, float eps, int64_t silu,
                                                int64_t dtype, int64_t weight_dtype, int64_t id, void* stream) {
  Device device;
  if (const cudaError_t error = describe(device, int(id))) return error;
  Shape s = make_shape(pixels, channels, groups, eps, silu, weight_dtype);
  size_t shared;
  const int v = plan(s, device, samples, dtype == 0 ? 4 : 2, 1, is_aligned(x) && is_aligned(y), shared);
  if (v == 0) return cudaErrorInvalidValue;
  const dim3 grid(s.groups / s.bundle * s.cluster, unsigned(samples));
  return DISPATCH(forward, dtype, v, y, mean, rstd, x, temb, weight, bias, s, grid, shared, stream);
}

extern "C" int fastgrpo_group_norm_silu_backward(void* dx, void* dweight, void* dbias, void* dtemb, float* shares,
                                                 const void* dy, const void* x, const void* temb, const void* weight,
                                                 const void* bias, const float* mean, const float* rstd,
                                                 int64_t samples, int64_t pixels, int64_t channels, int64_t groups,
                                                 int64_t silu, int64_t dtype, int64_t weight_dtype, int64_t id,
                                                 void* stream) {
  Device device;
  if (const cudaError_t error = describe(device, int(id))) return error;
  Shape s = make_shape(pixels, channels, groups, 0.0f, silu, weight_dtype);
  size_t shared;
  const bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx);
  const int v = plan(s, device, samples, dtype == 0 ? 4 : 2, 2, aligned, shared);
  if (v == 0) return cudaErrorInvalidValue;
  const dim3 grid(s.groups / s.bundle * s.cluster, unsigned(samples));
  cudaError_t error = DISPATCH(backward, dtype, v, dx, dtemb, shares, dy, x, temb, weight, bias, mean, rstd, s, grid,
                               shared, stream);
  if (error) return error;
  const dim3 blocks(unsigned((channels + 31) / 32), 2);
  const size_t bytes = kThreads * sizeof(float);
  const auto reduce = [&](auto* dw) {
    using W = std::remove_pointer_t<decltype(dw)>;
    return launch(reduce_kernel<W>, blocks, bytes, 1, stream, dw, static_cast<W*>(dbias),
                  static_cast<const float*>(shares), samples, channels);
  };
  if (weight_dtype == 0) return reduce(static_cast<float*>(dweight));
  return weight_dtype == 1 ? reduce(static_cast<__half*>(dweight)) : reduce(static_cast<__nv_bfloat16*>(dweight));
}

extern "C" const char* fastgrpo_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
