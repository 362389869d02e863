// Tells different or damaged bytes apart; no protection against somebody who makes them collide on purpose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace martlet {

class Fingerprint {
 public:
  void add(const void* data, size_t size) {
    const char* bytes = static_cast<const char*>(data);
    add_word(size);
    while (size >= 8) {
      uint64_t word;
      std::memcpy(&word, bytes, 8);
      add_word(word);
      bytes += 8;
      size -= 8;
    }
    if (size > 0) {
      uint64_t word = 0;
      std::memcpy(&word, bytes, size);
      add_word(word);
    }
  }
  void add(const std::string& text) { add(text.data(), text.size()); }
  // 32 hexadecimal digits.
  std::string hex() const {
    constexpr const char* kDigits = "0123456789abcdef";
    std::string out;
    for (const uint64_t half : {a_ ^ a_ >> 31, b_ ^ b_ >> 33}) {
      for (int shift = 60; shift >= 0; shift -= 4) out += kDigits[half >> shift & 15];
    }
    return out;
  }

 private:
  // Two FNV-1a's over words, with the odd constants of splitmix64, their high bits mixed back in.
  void add_word(uint64_t word) {
    a_ = (a_ ^ word) * 0xbf58476d1ce4e5b9;
    a_ ^= a_ >> 32;
    b_ = (b_ ^ word) * 0x94d049bb133111eb;
    b_ ^= b_ >> 29;
  }

  uint64_t a_ = 0xcbf29ce484222325, b_ = 0x9e3779b97f4a7c15;
};

}  // namespace martlet
