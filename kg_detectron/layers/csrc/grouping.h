// What grouping does on either device: spatial bins, so that a search costs what lies near it, and the rule of the
// nearest.
#pragma once

#include <cmath>
#include <cstdint>

#include "graph.h"

namespace kg {

// Side of a bin, pixels: a search within the usual radii meets few bins, and a bin holds few peaks.
constexpr int64_t kBin = 16;

// Bins of all images and keypoints, rows by columns each. Those of a row are neighbours in memory, and so are their
// peaks.
struct Bins {
    int64_t rows, columns;

    KG_HOST_DEVICE Bins(int64_t height, int64_t width)
        : rows((height + kBin - 1) / kBin), columns((width + kBin - 1) / kBin) {}
    KG_HOST_DEVICE int64_t row(int64_t image, int64_t k, int64_t bin_y) const {
        return ((image * kKeypoints + k) * rows + bin_y) * columns;
    }
    KG_HOST_DEVICE int64_t of(int64_t image, int64_t k, int64_t y, int64_t x) const {
        return row(image, k, y / kBin) + x / kBin;
    }
};

// Rows and columns of bins, both ends included, that hold every pixel within `reach` of a point.
struct Window {
    int64_t first_row, last_row, first_column, last_column;

    KG_HOST_DEVICE Window(const Bins& bins, double x, double y, double reach) {
        span(x, reach, bins.columns, first_column, last_column);
        span(y, reach, bins.rows, first_row, last_row);
    }

  private:
    // One pixel more on both sides: the ends are rounded. A point that is not finite has an empty window.
    KG_HOST_DEVICE static void span(double at, double reach, int64_t size, int64_t& first, int64_t& last) {
        const double low = floor((at - reach - 1) / kBin), high = floor((at + reach + 1) / kBin);
        first = low > 0 ? (low < size ? static_cast<int64_t>(low) : size) : 0;
        last = high >= 0 ? (high < size ? static_cast<int64_t>(high) : size - 1) : -1;
        if (!std::isfinite(at)) {
            last = first - 1;
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
