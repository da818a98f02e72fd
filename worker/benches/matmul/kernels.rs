//! The one contender without a safe interface.

#![expect(unsafe_code, reason = "the gemm crate takes pointers and strides")]

use std::hint::black_box;

use crate::Operand;

pub(crate) fn by_gemm(a: Operand<'_>, b: Operand<'_>, c: &mut [f32], m: usize, n: usize) {
    // (column stride, row stride)
    let strides =
        |x: Operand<'_>| if x.transposed { (x.columns as isize, 1) } else { (1, x.columns as isize) };
    let ((acs, ars), (bcs, brs)) = (strides(a), strides(b));
    let k = if a.transposed { a.rows } else { a.columns };
    let (a, b) = (black_box(a.data).as_ptr(), black_box(b.data).as_ptr());
    let (c, none) = (c.as_mut_ptr(), gemm::Parallelism::None);
    // SAFETY: the strides are those of row-major slices of rows · columns elements, which `main` allocated.
    unsafe {
        gemm::gemm(
            m, n, k, c, 1, n as isize, false, a, acs, ars, b, bcs, brs, 0.0, 1.0, false, false, false, none,
        );
    }
}
