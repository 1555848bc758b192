// Work of unequal size over all threads: each takes the next task when it is done with its last.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace kg {

// Calls run(0) .. run(count - 1), each once. What a task gives must not depend on the thread that it runs in.
template <typename Run>
void each_task(int64_t count, const Run& run) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t task = next++; task < count; task = next++) {
            run(task);
        }
    });
}

}  // namespace kg
