// Runs the threads of a kernel as fibers, in an order drawn from a seed, and watches them:
// - races: two accesses of different threads to one address without a synchronisation between them, at least one of
//   them a write that is not atomic. The kernels are compiled with GCC's instrumentation for ThreadSanitizer, whose
//   functions (__tsan_read4 ...) are defined here. This file itself is compiled without it.
// - shared memory that is read before the block has written it, and accesses beyond the bytes that a launch asked for;
// - barriers and warp primitives that not all of their threads reach.
// Faults end the launch with an error that names kernel and lines. Bytes and atomics are counted for the cost model.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "include/cuda_language.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

extern "C" __attribute__((visibility("hidden"))) char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu {

// NOLINTNEXTLINE: the names of the language
Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = size_t{1} << 18;

// What a launch gets without a further call.
constexpr size_t kMostDynamicShared = 48 * 1024;
alignas(16) __attribute__((section("cuda_shared"))) char dynamic_memory[kMostDynamicShared];

void forbid_dynamic_memory_from(size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(dynamic_memory, kMostDynamicShared);
    __asan_poison_memory_region(dynamic_memory + size, kMostDynamicShared - size);
#endif
    (void)size;
}
constexpr unsigned kWarp = 32;

// A stack, and where the code on it goes on. Switching costs some nanoseconds, without the system calls of swapcontext.
struct Context {
#ifdef __x86_64__
    void* top = nullptr;
#else
    ucontext_t state;
#endif
    char* stack = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

#ifdef __x86_64__
asm(R"(
.text
.local cuda_on_cpu_switch
cuda_on_cpu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#endif

void prepare(Context& context, void (*entry)()) {
#ifdef __x86_64__
    // Six registers and the entry, which finds the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(context.stack + kStack) - 1;
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    context.top = top;
#else
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = context.stack;
    context.state.uc_stack.ss_size = kStack;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
#endif
    context.size = kStack;
    context.fake_stack = nullptr;
}

void switch_to(Context& from, Context& to, bool for_ever = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#ifdef __x86_64__
    cuda_on_cpu_switch(&from.top, to.top);
#else
    swapcontext(&from.state, &to.state);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
    (void)for_ever;
}

struct Thread {
    enum class State { kReady, kInWarp, kInBlock, kDone } state = State::kReady;
    bool started = false;
    unsigned index = 0;
    Context context;
    // What it waits for.
    Operation operation{};
    unsigned mask = 0;
    int line = 0;
    uint64_t value = 0, received[kWarp] = {};
    uint32_t warp_epoch = 0;  // synchronisations of its warp that it has passed
    int64_t accesses = 0;     // to memory that is not shared
};

// An access to memory, as far as the race detector needs it.
struct Access {
    void* caller = nullptr;
    uint32_t block = 0, thread = 0, block_epoch = 0, warp_epoch = 0;
    bool atomic = false;
};

constexpr int kReaders = 4;

struct Cell {
    uintptr_t key = 0;
    uint64_t launch = 0;
    Access write, reads[kReaders];  // the last ones; no caller: none
    uint32_t atomics = 0;
};

struct Count {
    int64_t launches = 0, threads = 0, read = 0, written = 0, atomics = 0, most_atomics = 0, most_accesses = 0;
};

class Machine {
  public:
    uint64_t seed = 0;
    bool detects = true;
    std::map<std::string, Count> counts;

    void run(const char* kernel, unsigned blocks, unsigned threads, size_t shared, Body body, const void* arguments) {
        if (shared > kMostDynamicShared) {
            throw std::runtime_error(std::string("kernel ") + kernel + ": a launch gets up to " +
                                     std::to_string(kMostDynamicShared) + " bytes of shared memory, not " +
                                     std::to_string(shared));
        }
        forbid_dynamic_memory_from(shared);
        dynamic_size_ = shared;
        running_ = this;
        body_ = body;
        arguments_ = arguments;
        char here;
        host_low_ = reinterpret_cast<uintptr_t>(&here) - 4096;  // the launch's arguments lie above
        ++launch_;
        faults_.clear();
        count_ = &counts[kernel];
        ++count_->launches;
        count_->threads += static_cast<int64_t>(blocks) * threads;
        grid_size.x = blocks;
        block_size.x = threads;
        random_.seed(seed * 1000003 + launch_ % 1000003);
        std::vector<unsigned> order(blocks);
        for (unsigned b = 0; b < blocks; ++b) {
            order[b] = b;
        }
        std::shuffle(order.begin(), order.end(), random_);
        for (unsigned block : order) {
            run_block(block, threads);
            if (!faults_.empty()) {
                break;
            }
        }
        if (!faults_.empty()) {
            std::string text;
            for (const std::string& fault : faults_) {
                text += "\n" + fault;
            }
            throw std::runtime_error(std::string("kernel ") + kernel + ":" + text);
        }
    }

    void leave(bool for_ever = false) { switch_to(current_->context, host_, for_ever); }

    const uint64_t* meet_warp(Operation operation, unsigned mask, uint64_t value, int line) {
        Thread& thread = *current_;
        thread.state = Thread::State::kInWarp;
        thread.operation = operation;
        thread.mask = mask;
        thread.value = value;
        thread.line = line;
        release_warp(thread.index / kWarp);
        leave();
        return thread.received;
    }

    void meet_block(int line) {
        Thread& thread = *current_;
        thread.state = Thread::State::kInBlock;
        thread.operation = Operation::kSyncBlock;
        thread.line = line;
        ++in_block_;
        if (in_block_ == threads_.size()) {
            for (const Thread& other : threads_) {
                if (other.line != line) {
                    faults_.push_back("divergent barrier: threads of block " + std::to_string(block_) +
                                      " meet at lines " + std::to_string(line) + " and " + std::to_string(other.line));
                    break;
                }
            }
            in_block_ = 0;
            ++block_epoch_;
            for (Thread& other : threads_) {
                ++other.warp_epoch;
                make_ready(other);
            }
        }
        leave();
    }

    void before_atomic(void* address, size_t size, void* caller) {
        if (!current_) {
            return;
        }
        if (random_() % 2) {
            make_ready(*current_);
            leave();
        }
        ++count_->atomics;
        ++current_->accesses;
        access(reinterpret_cast<uintptr_t>(address), size, /*writes=*/true, /*atomic=*/true, caller);
    }

    // A load or store of the kernel.
    void access(uintptr_t address, size_t size, bool writes, bool atomic, void* caller) {
        if (!current_ || is_private(address)) {
            return;
        }
        const bool shared = address >= reinterpret_cast<uintptr_t>(__start_cuda_shared) &&
                            address < reinterpret_cast<uintptr_t>(__stop_cuda_shared);
        if (!shared && !atomic) {
            (writes ? count_->written : count_->read) += static_cast<int64_t>(size);
            ++current_->accesses;
        }
        const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
        if (address + size > dynamic + dynamic_size_ && address < dynamic + kMostDynamicShared && address >= dynamic) {
            faults_.push_back("beyond the " + std::to_string(dynamic_size_) + " bytes of shared memory at " +
                              line_of(caller));
            return;
        }
        if (!detects) {
            return;
        }
        // Units of four bytes, or of one where the access is smaller or lies across. A fault of one unit is enough.
        const size_t unit = size % 4 == 0 && address % 4 == 0 ? 4 : 1;
        for (size_t i = 0; i < size; i += unit) {
            if (access_unit(address + i, shared, writes, atomic, caller)) {
                return;
            }
        }
    }

  private:
    static void enter() {
        Machine& self = *running_;
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(reinterpret_cast<void**>(&self.host_.stack)),
                                        &self.host_.size);
#endif
        self.body_(self.arguments_);
        self.current_->state = Thread::State::kDone;
        self.leave(/*for_ever=*/true);
    }

    void make_ready(Thread& thread) {
        thread.state = Thread::State::kReady;
        ready_.push_back(&thread);
    }

    void run_block(unsigned block, unsigned threads) {
        block_ = block;
        block_epoch_ = in_block_ = 0;
        threads_.assign(threads, Thread());
        ready_.clear();
        for (unsigned t = 0; t < threads; ++t) {
            threads_[t].index = t;
            ready_.push_back(&threads_[t]);
        }
        size_t done = 0;
        while (!ready_.empty() && faults_.empty()) {
            std::swap(ready_[random_() % ready_.size()], ready_.back());
            Thread& thread = *ready_.back();
            ready_.pop_back();
            if (!thread.started) {
                thread.started = true;
                thread.context.stack = take_stack();
                prepare(thread.context, &Machine::enter);
            }
            thread_index.x = thread.index;
            block_index.x = block;
            current_ = &thread;
            switch_to(host_, thread.context);
            current_ = nullptr;
            if (thread.state == Thread::State::kDone) {
                free_stacks_.push_back(thread.context.stack);
                thread.context.stack = nullptr;
                count_->most_accesses = std::max(count_->most_accesses, thread.accesses);
                ++done;
            }
        }
        if (done < threads) {
            if (faults_.empty()) {
                report_stuck(done);
            }
            for (Thread& thread : threads_) {
                if (thread.context.stack) {
                    free_stacks_.push_back(thread.context.stack);
                }
            }
        }
    }

    char* take_stack() {
        if (free_stacks_.empty()) {
            void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) {
                throw std::runtime_error("no memory for the stack of a fiber");
            }
            return static_cast<char*>(memory);
        }
        char* stack = free_stacks_.back();
        free_stacks_.pop_back();
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack, kStack);  // what frames that never returned left
#endif
        return stack;
    }

    // The lanes of a warp go on once all of the mask wait for the same.
    void release_warp(unsigned warp) {
        Thread* lanes = &threads_[warp * kWarp];
        const unsigned size = std::min<unsigned>(kWarp, static_cast<unsigned>(threads_.size()) - warp * kWarp);
        const Thread& last = *current_;
        const unsigned whole = size == kWarp ? 0xffffffff : (1u << size) - 1;
        if (last.mask != whole && last.mask != 0xffffffff) {
            faults_.push_back("line " + std::to_string(last.line) + ": this stand-in knows full warps only");
            return;
        }
        for (unsigned lane = 0; lane < size; ++lane) {
            if (lanes[lane].state != Thread::State::kInWarp) {
                return;
            }
        }
        for (unsigned lane = 0; lane < size; ++lane) {
            if (lanes[lane].operation != last.operation || lanes[lane].line != last.line) {
                faults_.push_back("divergent warp: lanes of block " + std::to_string(block_) + " meet at lines " +
                                  std::to_string(last.line) + " and " + std::to_string(lanes[lane].line));
                return;
            }
        }
        for (unsigned lane = 0; lane < size; ++lane) {
            for (unsigned other = 0; other < size; ++other) {
                lanes[lane].received[other] = lanes[other].value;
            }
            // Shuffles and ballots order no accesses to memory.
            lanes[lane].warp_epoch += last.operation == Operation::kSyncWarp;
            make_ready(lanes[lane]);
        }
    }

    void report_stuck(size_t done) {
        std::map<int, int> waiting;
        for (const Thread& thread : threads_) {
            if (thread.state != Thread::State::kDone) {
                ++waiting[thread.line];
            }
        }
        std::ostringstream text;
        text << "divergent barrier: of the " << threads_.size() << " threads of block " << block_ << ", " << done
             << " have ended";
        for (const auto& [line, count] : waiting) {
            text << ", " << count << " wait at line " << line;
        }
        faults_.push_back(text.str());
    }

    // The running thread's stack, that of the host, where the arguments of the kernel lie, and the machine's own data:
    // the indices of the thread, and what the lanes of a warp exchanged.
    bool is_private(uintptr_t address) const {
        const auto stack = reinterpret_cast<uintptr_t>(current_->context.stack);
        const auto threads = reinterpret_cast<uintptr_t>(threads_.data());
        const auto index = [&](const Index& part) { return address == reinterpret_cast<uintptr_t>(&part); };
        return (address >= stack && address < stack + kStack) || (address >= host_low_ && address < host_high()) ||
               (address >= threads && address < threads + threads_.size() * sizeof(Thread)) || index(thread_index) ||
               index(block_index) || index(block_size) || index(grid_size);
    }

    static uintptr_t host_high() {
        static thread_local const uintptr_t high = [] {
            pthread_attr_t attributes;
            void* low = nullptr;
            size_t size = 0;
            pthread_getattr_np(pthread_self(), &attributes);
            pthread_attr_getstack(&attributes, &low, &size);
            pthread_attr_destroy(&attributes);
            return reinterpret_cast<uintptr_t>(low) + size;
        }();
        return high;
    }

    // Whether an earlier access of this launch happened before what the running thread does now.
    bool ordered(const Access& earlier) const {
        const Thread& thread = *current_;
        return earlier.block == block_ &&
               (earlier.thread == thread.index || earlier.block_epoch < block_epoch_ ||
                (earlier.thread / kWarp == thread.index / kWarp && earlier.warp_epoch < thread.warp_epoch));
    }

    bool access_unit(uintptr_t address, bool shared, bool writes, bool atomic, void* caller) {
        Cell& cell = find_cell(address, shared);
        const Access access{caller,       static_cast<uint32_t>(block_), current_->index,
                            block_epoch_, current_->warp_epoch,          atomic};
        if (atomic) {
            count_->most_atomics = std::max<int64_t>(count_->most_atomics, ++cell.atomics);
        }
        if (shared && !writes && !cell.write.caller) {
            faults_.push_back("shared memory is read before this block wrote it, at " + line_of(caller));
            return true;
        }
        if (cell.write.caller && !ordered(cell.write) && !(cell.write.atomic && atomic)) {
            return report_race(access, writes, cell.write, true, address);
        }
        if (!writes) {
            remember_read(cell, access);
            return false;
        }
        for (Access& read : cell.reads) {
            if (read.caller && !ordered(read) && !(read.atomic && atomic)) {
                return report_race(access, true, read, false, address);
            }
            read.caller = nullptr;
        }
        cell.write = access;
        return false;
    }

    // In the place of one by the same thread, or that happened before, or of any.
    void remember_read(Cell& cell, const Access& access) {
        Access* place = &cell.reads[random_() % kReaders];
        for (Access& read : cell.reads) {
            if (!read.caller || ordered(read)) {
                place = &read;
                break;
            }
        }
        *place = access;
    }

    // Open addressing; cells of earlier launches are free.
    Cell& find_cell(uintptr_t address, bool shared) {
        // Shared memory is another one for each block.
        const uintptr_t key = shared ? address ^ (static_cast<uintptr_t>(block_ + 1) << 48) : address;
        if (2 * used_ >= cells_.size()) {
            grow();
        }
        if (cells_launch_ != launch_) {
            cells_launch_ = launch_;
            used_ = 0;
        }
        for (size_t i = key * 0x9e3779b97f4a7c15 >> 20;; ++i) {
            Cell& cell = cells_[i & (cells_.size() - 1)];
            if (cell.launch != launch_) {
                cell = Cell();
                cell.key = key;
                cell.launch = launch_;
                ++used_;
                return cell;
            }
            if (cell.key == key) {
                return cell;
            }
        }
    }

    void grow() {
        std::vector<Cell> old(std::max<size_t>(1 << 16, 4 * cells_.size()));
        old.swap(cells_);
        for (const Cell& cell : old) {
            if (cell.launch == launch_ && launch_ == cells_launch_) {
                for (size_t i = cell.key * 0x9e3779b97f4a7c15 >> 20;; ++i) {
                    Cell& place = cells_[i & (cells_.size() - 1)];
                    if (place.launch != launch_) {
                        place = cell;
                        break;
                    }
                }
            }
        }
    }

    bool report_race(const Access& now, bool writes, const Access& before, bool wrote, uintptr_t address) {
        const auto describe = [](const Access& access, bool write) {
            std::ostringstream text;
            text << (access.atomic ? "atomic"
                     : write       ? "write"
                                   : "read")
                 << " at " << line_of(access.caller) << " by thread " << access.thread << " of block " << access.block;
            return text.str();
        };
        std::ostringstream text;
        text << "race at address 0x" << std::hex << address << ": " << describe(before, wrote) << ", "
             << describe(now, writes);
        faults_.push_back(text.str());
        return true;
    }

    // Source line of an address of code.
    static std::string line_of(void* caller) {
        Dl_info info;
        const char* before = static_cast<const char*>(caller) - 1;
        if (!dladdr(before, &info)) {
            return "an unknown line";
        }
        std::ostringstream command;
        command << "addr2line -s -e '" << info.dli_fname << "' 0x" << std::hex
                << before - static_cast<const char*>(info.dli_fbase);
        std::string line = "an unknown line";
        if (FILE* pipe = popen(command.str().c_str(), "r")) {
            char text[256];
            if (fgets(text, sizeof(text), pipe)) {
                line = text;
                line = line.substr(0, line.find_first_of(" \n"));
            }
            pclose(pipe);
        }
        return line;
    }

    static Machine* running_;
    Body body_ = nullptr;
    const void* arguments_ = nullptr;
    uintptr_t host_low_ = 0;
    uint64_t launch_ = 0, cells_launch_ = 0;
    unsigned block_ = 0;
    uint32_t block_epoch_ = 0;
    size_t in_block_ = 0, dynamic_size_ = 0;
    std::minstd_rand random_;
    Context host_;
    Thread* current_ = nullptr;
    std::vector<Thread> threads_;
    std::vector<Thread*> ready_;
    std::vector<char*> free_stacks_;
    std::vector<std::string> faults_;
    Count* count_ = nullptr;
    std::vector<Cell> cells_;
    size_t used_ = 0;
};

Machine* Machine::running_ = nullptr;
Machine machine;

}  // namespace

const uint64_t* meet_warp(Operation operation, unsigned mask, uint64_t value, int line) {
    return machine.meet_warp(operation, mask, value, line);
}

void meet_block(int line) {
    machine.meet_block(line);
}

void before_atomic(void* address, size_t size, void* caller) {
    machine.before_atomic(address, size, caller);
}

void run(const char* kernel, unsigned blocks, unsigned threads, size_t shared, Body thread, const void* arguments) {
    machine.run(kernel, blocks, threads, shared, thread, arguments);
}

void* dynamic_shared() {
    return dynamic_memory;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

// The order of blocks and threads of the launches to come.
CUDA_ON_CPU_EXPORT void cuda_on_cpu_set_seed(uint64_t seed) {
    cuda_on_cpu::machine.seed = seed;
}

// Whether races are looked for; counting alone is quicker.
CUDA_ON_CPU_EXPORT void cuda_on_cpu_set_detection(bool detects) {
    cuda_on_cpu::machine.detects = detects;
}

// "kernel launches threads read written atomics most_atomics most_accesses" of each kernel, a line each, since the last
// call. The last two: of atomics on one address, and of accesses by one thread, in one launch.
CUDA_ON_CPU_EXPORT const char* cuda_on_cpu_take_counts() {
    static std::string result;
    std::ostringstream text;
    for (const auto& [kernel, count] : cuda_on_cpu::machine.counts) {
        text << kernel << " " << count.launches << " " << count.threads << " " << count.read << " " << count.written
             << " " << count.atomics << " " << count.most_atomics << " " << count.most_accesses << "\n";
    }
    cuda_on_cpu::machine.counts.clear();
    result = text.str();
    return result.c_str();
}

// What GCC's -fsanitize=thread calls. libtsan is not linked.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CUDA_ON_CPU_ACCESS(size)                                                              \
    void __tsan_read##size(void* address) {                                                   \
        cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, false, false, \
                                    __builtin_return_address(0));                             \
    }                                                                                         \
    void __tsan_write##size(void* address) {                                                  \
        cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, true, false,  \
                                    __builtin_return_address(0));                             \
    }                                                                                         \
    void __tsan_unaligned_read##size(void* address) {                                         \
        cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, false, false, \
                                    __builtin_return_address(0));                             \
    }                                                                                         \
    void __tsan_unaligned_write##size(void* address) {                                        \
        cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, true, false,  \
                                    __builtin_return_address(0));                             \
    }
CUDA_ON_CPU_ACCESS(1)
CUDA_ON_CPU_ACCESS(2)
CUDA_ON_CPU_ACCESS(4)
CUDA_ON_CPU_ACCESS(8)
CUDA_ON_CPU_ACCESS(16)

void __tsan_read_range(void* address, size_t size) {
    cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
    cuda_on_cpu::machine.access(reinterpret_cast<uintptr_t>(address), size, true, false, __builtin_return_address(0));
}

// Atomics of the host's code, such as the reference counts of tensors.
#define CUDA_ON_CPU_ATOMIC(bits)                                                                                       \
    uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                                 \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {                              \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                      \
    }                                                                                                                  \
    uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v, int) {                \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v, int) {                \
        return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    uint##bits##_t __tsan_atomic##bits##_fetch_and(volatile uint##bits##_t* p, uint##bits##_t v, int) {                \
        return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    uint##bits##_t __tsan_atomic##bits##_fetch_or(volatile uint##bits##_t* p, uint##bits##_t v, int) {                 \
        return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                              \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v, \
                                                      int, int) {                                                      \
        return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
    }                                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v,   \
                                                    int, int) {                                                        \
        return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
    }
CUDA_ON_CPU_ATOMIC(8)
CUDA_ON_CPU_ATOMIC(16)
CUDA_ON_CPU_ATOMIC(32)
CUDA_ON_CPU_ATOMIC(64)
void __tsan_atomic_thread_fence(int) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void __tsan_atomic_signal_fence(int) {}
}
