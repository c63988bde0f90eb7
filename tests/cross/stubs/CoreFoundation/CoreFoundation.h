// The few CoreFoundation names that metal-cpp uses, for building without Apple's SDK.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif
typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
#ifdef __cplusplus
}
#endif
