// The part of the CUDA language that the kernels use, for a C++ compiler. Every thread of a block runs as a fiber of
// `machine.cpp`, which switches between them at each synchronisation, warp primitive and atomic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
// In a section of its own, so that the machine knows which addresses are shared memory. Blocks run one after another.
#define __shared__ static __attribute__((section("cuda_shared")))

namespace cuda_on_cpu {

struct Index {
    unsigned x;
};

// Of the running thread.
extern Index thread_index, block_index, block_size, grid_size;

enum class Operation { kShuffle, kBallot, kSyncWarp, kSyncBlock };

// Waits for the other lanes of the mask. Returns the values that the 32 lanes of the warp came with.
const uint64_t* meet_warp(Operation operation, unsigned mask, uint64_t value, int line);
void meet_block(int line);

// Before an atomic: lets others run, and tells the race detector.
void before_atomic(void* address, size_t size, void* caller);

// What one thread does, with the arguments of the launch.
using Body = void (*)(const void* arguments);

// shared: bytes of dynamic shared memory.
void run(const char* kernel, unsigned blocks, unsigned threads, size_t shared, Body thread, const void* arguments);

// Of the running block: `extern __shared__ T name[]` is translated to a pointer to it.
void* dynamic_shared();

struct Stream {};

template <typename Kernel, typename... Arguments>
void launch(const char* name, unsigned blocks, unsigned threads, size_t shared, Stream, Kernel kernel,
            Arguments... arguments) {
    // The arguments lie on the stack of the host, whose accesses are not watched.
    const auto thread = [&] { kernel(arguments...); };
    run(name, blocks, threads, shared, [](const void* self) { (*static_cast<decltype(thread)*>(self))(); }, &thread);
}

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// One at a time, as only one fiber runs.
template <typename T, typename Change>
__attribute__((noinline, no_sanitize("thread"))) T change(T* address, Change change_value) {
    before_atomic(address, sizeof(T), __builtin_return_address(0));
    const T previous = *address;
    *address = change_value(previous);
    return previous;
}

}  // namespace cuda_on_cpu

#define threadIdx ::cuda_on_cpu::thread_index
#define blockIdx ::cuda_on_cpu::block_index
#define blockDim ::cuda_on_cpu::block_size
#define gridDim ::cuda_on_cpu::grid_size

inline void __syncthreads(int line = __builtin_LINE()) {
    ::cuda_on_cpu::meet_block(line);
}

inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
    ::cuda_on_cpu::meet_warp(::cuda_on_cpu::Operation::kSyncWarp, mask, 0, line);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
    const uint64_t* values = ::cuda_on_cpu::meet_warp(::cuda_on_cpu::Operation::kBallot, mask, predicate, line);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) {
        ballot |= static_cast<unsigned>(values[lane] != 0) << lane;
    }
    return ballot;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
    using namespace ::cuda_on_cpu;
    return from_bits<T>(meet_warp(Operation::kShuffle, mask, to_bits(value), line)[lane % 32]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
    using namespace ::cuda_on_cpu;
    return from_bits<T>(meet_warp(Operation::kShuffle, mask, to_bits(value), line)[(thread_index.x % 32) ^ distance]);
}

template <typename T>
T atomicAdd(T* address, T value) {
    return ::cuda_on_cpu::change(address, [=](T previous) { return previous + value; });
}

template <typename T>
T atomicMax(T* address, T value) {
    return ::cuda_on_cpu::change(address, [=](T previous) { return std::max(previous, value); });
}

template <typename T>
T atomicMin(T* address, T value) {
    return ::cuda_on_cpu::change(address, [=](T previous) { return std::min(previous, value); });
}

inline int __ffs(int value) {
    return __builtin_ffs(value);
}
inline long long __double_as_longlong(double value) {
    return ::cuda_on_cpu::from_bits<long long>(::cuda_on_cpu::to_bits(value));
}
inline double __longlong_as_double(long long value) {
    return ::cuda_on_cpu::from_bits<double>(::cuda_on_cpu::to_bits(value));
}
inline unsigned __float_as_uint(float value) {
    return ::cuda_on_cpu::from_bits<unsigned>(::cuda_on_cpu::to_bits(value));
}
inline long long __double2ll_rn(double value) {
    return std::llrint(value);
}

using std::ilogb;
using std::isfinite;
using std::max;
using std::min;
using std::scalbn;
