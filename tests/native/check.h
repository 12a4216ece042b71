// A test is a function under TEST; CHECK says what did not hold and lets the test go on.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
inline bool add(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}
inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  ++failures();
}
inline int run_all() {
  for (const Test& test : tests()) {
    const int before = failures();
    test.body();
    std::printf("%-60s %s\n", test.name, failures() == before ? "ok" : "FAILED");
  }
  return failures() == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                          \
  static void name();                                       \
  static const bool added_##name = check::add(#name, name); \
  static void name()

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not " #condition); \
  } while (false)

// A status must have this code and a message that contains this text.
#define CHECK_STATUS(expression, expected, text)                                                             \
  do {                                                                                                       \
    const daco::Status got = (expression);                                                                   \
    if (got.code != (expected) || std::strstr(got.message, text) == nullptr) {                               \
      check::fail(                                                                                           \
          __FILE__, __LINE__,                                                                                \
          std::string(#expression) + " said \"" + got.message + "\" where \"" + (text) + "\" was expected"); \
    }                                                                                                        \
  } while (false)

#define CHECK_OK(expression) CHECK_STATUS(expression, daco::Code::kOk, "")
