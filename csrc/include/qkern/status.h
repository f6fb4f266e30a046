#pragma once

namespace qkern {

// What a launcher tells its caller. `message` points to a string literal, so a Status never owns
// memory and can cross thread and language boundaries freely.
struct [[nodiscard]] Status {
  const char* message = nullptr;

  constexpr bool ok() const { return message == nullptr; }
  static constexpr Status success() { return {}; }
  static constexpr Status error(const char* what) { return {what}; }
};

}  // namespace qkern
