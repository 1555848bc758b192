// Hough voting (paper, equation 2): the bilinear vote of one pixel, the same on both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace kg {

// A vote for the place (x, y) goes to the four pixels around it.
template <typename T>
struct Vote {
    bool lands;         // on at least one pixel of the map; otherwise all the rest is 0
    int32_t left, top;  // the upper left of the four pixels, from -1 on
    T value, dx, dy;    // the value cast, and the place within the square of the four pixels

    // Values and places that are not finite cast no vote. Conditions do not short-circuit, so that compilers vectorise.
    KG_HOST_DEVICE Vote(T cast, T x, T y, T height, T width) {
        lands = (x > -1) & (x < width) & (y > -1) & (y < height) & (std::abs(cast) <= std::numeric_limits<T>::max());
        const T inside_x = lands ? x : T(0), inside_y = lands ? y : T(0);
        value = lands ? cast : T(0);
        // The floor of a number above -1.
        left = static_cast<int32_t>(inside_x) - (inside_x < 0);
        top = static_cast<int32_t>(inside_y) - (inside_y < 0);
        dx = inside_x - left;
        dy = inside_y - top;
    }

    // What the pixel at column left + right, row top + below gets; each of the two is 0 or 1.
    KG_HOST_DEVICE T corner(int right, int below) const {
        return value * ((right ? dx : 1 - dx) * (below ? dy : 1 - dy));
    }
};

// 1 / (pi r^2): one full disc of votes adds up to 1.
inline double vote_scale(double radius) {
    constexpr double kPi = 3.14159265358979323846;
    return 1 / (kPi * radius * radius);
}

}  // namespace kg
