#pragma once

namespace qkern {

// What a launcher tells its caller. Both texts point to string literals (or to the CUDA runtime's
// own constant texts), so a Status never owns memory and can cross thread and language boundaries
// freely. `detail`, where there is one, is the runtime's reason.
struct [[nodiscard]] Status {
  const char* message = nullptr;
  const char* detail = nullptr;

  constexpr bool ok() const { return message == nullptr; }
  static constexpr Status success() { return {}; }
  static constexpr Status error(const char* what, const char* why = nullptr) { return {what, why}; }
};

}  // namespace qkern
