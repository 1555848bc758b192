// What grouping does on either device: spatial bins, so that a search costs what lies near it, and the rule of the
// nearest.
#pragma once

#include <cmath>
#include <cstdint>

#include "graph.h"

namespace kg {

// Positions of peaks are below this.
constexpr int64_t kMostPixels = int64_t{1} << 31;

// Square bins, wide enough for a search to meet nine at most, and narrow enough to hold few peaks of one type. They are
// hashed into buckets, at least twice as many as there are peaks: memory and time follow the peaks, however large the
// image. A bucket may hold peaks of other bins, types and groups; whoever looks into it compares.
struct Bins {
    double per_pixel;  // 1 / side
    uint64_t buckets;  // a power of two

    Bins(int64_t peaks, double match_radius, double reject_radius)
        : per_pixel(1 / std::fmax(16.0, std::fmax(match_radius, reject_radius) + 1)), buckets(1) {
        while (buckets < 2 * static_cast<uint64_t>(peaks)) {
            buckets *= 2;
        }
    }
    // at: not negative.
    KG_HOST_DEVICE int64_t index(double at) const { return static_cast<int64_t>(at * per_pixel); }
    KG_HOST_DEVICE int64_t bucket(int64_t group, int64_t k, int64_t row, int64_t column) const {
        // Neighbouring columns are neighbouring buckets; odd factors mix the rest.
        const uint64_t line = (static_cast<uint64_t>(group) * kKeypoints + k) * 0x9e3779b97f4a7c15 +
                              static_cast<uint64_t>(row) * 0xc2b2ae3d27d4eb4f;
        return static_cast<int64_t>(((line >> 20) + static_cast<uint64_t>(column)) & (buckets - 1));
    }
};

// Rows and columns of bins, both ends included, that hold every pixel within `reach` of a point.
struct Window {
    int64_t first_row, last_row, first_column, last_column;

    KG_HOST_DEVICE Window(const Bins& bins, double x, double y, double reach) {
        span(bins, x, reach, first_column, last_column);
        span(bins, y, reach, first_row, last_row);
    }

  private:
    // One pixel more on both sides: the ends are rounded. A point that is not a number has an empty window.
    KG_HOST_DEVICE static void span(const Bins& bins, double at, double reach, int64_t& first, int64_t& last) {
        first = 0;
        last = -1;
        if (at + reach + 1 >= 0 && at - reach - 1 < kMostPixels) {
            first = bins.index(fmax(at - reach - 1, 0.0));
            last = bins.index(fmin(at + reach + 1, static_cast<double>(kMostPixels)));
        }
    }
};

// A peak looked at as a partner; of equally near ones the first in the queue wins, whatever the order of looking.
struct Nearest {
    double squared = INFINITY;
    int64_t peak = -1;

    KG_HOST_DEVICE void offer(double other_squared, int64_t other) {
        if (other_squared < squared || (other_squared == squared && other_squared < INFINITY && other < peak)) {
            squared = other_squared;
            peak = other;
        }
    }
};

}  // namespace kg
