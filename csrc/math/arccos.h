// The arc-cosine kernels of order 0 and 1 (Cho and Saul 2009) without cancellation.
#pragma once
#include "portable.h"

namespace ntk {

// theta = 2 asin(y), y^2 = z:   theta / pi = y A(z),   (sin theta - theta cos theta) / pi = y^3 G(z).
// Chebyshev fits of A (`Angle`) and G (`Area`) on [0, 1/2], [0, 0.28] and [0, 0.1]: the deeper a layer, the closer its
// correlations are to 1 and the fewer terms are needed. Made by mpmath 1.3 with dps = 50 (N coefficients on [0, b]):
//   A = lambda z: 2*asin(sqrt(z))/(pi*sqrt(z))
//   G = lambda z: (sin(2*asin(sqrt(z))) - 2*asin(sqrt(z))*(1-2*z))/(pi*z**1.5)
//   chebyfit(A, [0, b], N), chebyfit(G, [0, b], N)
NTK_CONSTANT double kAngle64_0[] = {  // relative error 8.9e-17
    0.636619772367581296, 0.106103295394657572, 0.0477464829145494588, 0.0284205266557018564,
    0.019341697383177887, 0.0142438872130738802, 0.0110234530403107624, 0.00918336661030527982,
    0.00473939771397867685, 0.0234011357980250395, -0.0789932532479917769, 0.31513098125964184,
    -0.850611880602707582, 1.74009062924961106, -2.53007467539391441, 2.52430309209443523, -1.54146942566329678,
    0.448991059689783816};
NTK_CONSTANT double kArea64_0[] = {  // relative error 3.0e-16
    0.848826363156774959, 0.0848826363158462508, 0.0272837045014795889, 0.0126313465936277762,
    0.00703329600919765662, 0.00438371874145893717, 0.00292681035050856784, 0.00227138291300341124,
    0.000352138449858530268, 0.00692405766436102186, -0.0190279225517964622, 0.0506792686652379015,
    -0.0873705404558969734, 0.104703114127178032, -0.0748348671259576752, 0.0260778614179259098};
NTK_CONSTANT double kAngle32_0[] = {  // relative error 1.3e-8
    0.636619765180905658, 0.106105128891007373, 0.0476708171141532819, 0.0295906278045466884,
    0.0106515330250400138, 0.0480901008830046076, -0.0573506667758695796, 0.0698206262441251457};
NTK_CONSTANT double kArea32_0[] = {  // relative error 2.0e-9
    0.848826361946425485, 0.0848829451925051619, 0.0272709390602642719, 0.0128293085527033436,
    0.00555629385128629987, 0.0101779101664469336, -0.00891190918054884454, 0.0129282256622285375};
NTK_CONSTANT double kAngle64_1[] = {  // relative error 5.9e-17
    0.636619772367581387, 0.106103295394543685, 0.0477464829381693003, 0.0284205247250516099,
    0.0193417799556783947, 0.0142417598071410258, 0.0110593119733403346, 0.00876644984255679909,
    0.00820535592040756042, 0.00226344685034090783, 0.0173819833643091772, -0.0177580120367357098,
    0.0251897722900809868};
NTK_CONSTANT double kArea64_1[] = {  // relative error 1.0e-16
    0.848826363156775045, 0.0848826363157592159, 0.0272837045161878162, 0.0126313456061493893,
    0.00703333119882996143, 0.00438294877178899054, 0.00293806067898923677, 0.0021561040530768682,
    0.00120165525232666411, 0.00238822094348076239, -0.00160055133417642343, 0.00343722951549714157};
NTK_CONSTANT double kAngle32_1[] = {  // relative error 7.2e-9
    0.636619766850318845, 0.10610470958522039, 0.0476885314773366256, 0.0292737018140913049,
    0.0138376320777893302, 0.0294286320106612983};
NTK_CONSTANT double kArea32_1[] = {  // relative error 1.7e-9
    0.848826361816515837, 0.0848829799749908816, 0.0272695955564603062, 0.0128398655423419147,
    0.00567820683083394612, 0.00818124629143558617};
NTK_CONSTANT double kAngle64_2[] = {  // relative error 7.8e-17
    0.636619772367581414, 0.106103295394482224, 0.0477464829580634637, 0.0284205224374998154,
    0.0193419054006796938, 0.0142380294928357311, 0.0111223903711800884, 0.00817211225413516658,
    0.0109111498371787804};
NTK_CONSTANT double kArea64_2[] = {  // relative error 1.4e-17
    0.848826363156775137, 0.0848826363156564314, 0.0272837045356468776, 0.0126313441168349941,
    0.00703339162750571543, 0.00438149101709126197, 0.00295979514252257481, 0.00195883444581487806,
    0.00221110807863207819};
NTK_CONSTANT double kAngle32_2[] = {  // relative error 1.9e-8
    0.636619754769288538, 0.106108913783613035, 0.0474690807457048883, 0.0327199077863062484};
NTK_CONSTANT double kArea32_2[] = {  // relative error 6.7e-9
    0.848826356908152971, 0.084884631941547137, 0.027184982540894134, 0.0141689113095327412};

// Largest z of the fits: the plan of a dense network chooses one for every layer, convolutions by the z they meet.
NTK_CONSTANT double kArcRange[] = {0.5, 0.28, 0.1};

template <int RANGE, class T>
NTK_INLINE T angle_fit(T z, T z2) {
    if (Single<T>::value) {
        if (RANGE == 0) return horner(kAngle32_0, z, z2);
        return RANGE == 1 ? horner(kAngle32_1, z, z2) : horner(kAngle32_2, z, z2);
    }
    if (RANGE == 0) return horner(kAngle64_0, z, z2);
    return RANGE == 1 ? horner(kAngle64_1, z, z2) : horner(kAngle64_2, z, z2);
}
template <int RANGE, class T>
NTK_INLINE T area_fit(T z, T z2) {
    if (Single<T>::value) {
        if (RANGE == 0) return horner(kArea32_0, z, z2);
        return RANGE == 1 ? horner(kArea32_1, z, z2) : horner(kArea32_2, z, z2);
    }
    if (RANGE == 0) return horner(kArea64_0, z, z2);
    return RANGE == 1 ? horner(kArea64_1, z, z2) : horner(kArea64_2, z, z2);
}

template <class T>
struct Arc {
    T theta;  // angle / pi
    T area;   // g(angle) = (sin(angle) - angle cos(angle)) / pi
};

// arc(x): the acute angle whose cosine is 1 - x, and g of it.
//   domain  0 <= x <= 2 kArcRange[RANGE], x = 1 - |rho|; NaN stays NaN
//   ends    x = 0: both 0, exactly;  x = 1: 1/2 and 1/pi
//   error   relative, f64 4 ulp, f32 4 ulp                    (rows `theta`, `area` of tests/test_math.py)
//   use     kappa1(rho) = 1 - x + area (rho >= 0), area (rho < 0); kappa0 = 1 - theta, theta
template <int RANGE = 0, class T>
NTK_INLINE Arc<T> arc_half(T z) {  // from z = x / 2
    T y = root_(z);
    T z2 = z * z;
    return {y * angle_fit<RANGE>(z, z2), y * (z * area_fit<RANGE>(z, z2))};
}
template <int RANGE = 0, class T>
NTK_INLINE Arc<T> arc(T x) {
    return arc_half<RANGE>(T(0.5) * x);
}

}  // namespace ntk
