// Stands in for Apple's header: metal-cpp passes the reference through.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
