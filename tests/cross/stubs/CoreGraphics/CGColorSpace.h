// Stands in for Apple's header: metal-cpp includes it from headers that the extension does not call into.
#pragma once
