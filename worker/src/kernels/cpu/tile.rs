//! The small products inside attention: a few rows times a few vectors at a time, held in registers.
//!
//! Attention multiplies many matrices of 8 to 128 rows, where a general product spends more on packing and calls
//! than on arithmetic. Everything here lies in the first-level cache already and is read where it is.

#![expect(clippy::needless_range_loop, reason = "an index addresses several arrays at once")]

use std::ops::Range;

use pulp::Simd;

use crate::kernels::Write;

/// A row-major matrix inside a slice.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Strided<'a> {
    /// The matrix whose element (row, column) is `data[start + row * stride + column]`.
    #[inline(always)]
    pub(super) fn new(data: &'a [f32], start: usize, stride: usize) -> Self {
        Self { data: &data[start..], stride }
    }

    /// The same matrix without its first rows.
    #[inline(always)]
    pub(super) fn skip_rows(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], stride: self.stride }
    }

    /// `len` elements of a row, from `column` on.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, column: usize, len: usize) -> &'a [f32] {
        &self.data[row * self.stride + column..][..len]
    }

    #[inline(always)]
    fn vectors<S: Simd, const N: usize>(&self, row: usize, column: usize) -> [S::f32s; N] {
        let (vectors, _) = S::as_simd_f32s(self.row(row, column, N * S::F32_LANES));
        std::array::from_fn(|n| vectors[n])
    }
}

/// Where a product goes: rows `stride` apart, each `width` elements, a multiple of the vector.
pub(super) struct Destination<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) write: Write,
}

/// The left operand of a product.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Element (row, k) lies at row `row`, column `k`.
    Rows(Strided<'a>),
    /// Element (row, k) lies at row `k`, column `row`.
    Columns(Strided<'a>),
}

/// destination (rows, width) = or += left (rows, K) · right (K, width), where `terms` gives the range of k that
/// counts for a tile of rows, so that causally masked terms are skipped.
#[inline(always)]
pub(super) fn product<S: Simd>(
    simd: S,
    destination: Destination<'_>,
    left: Left<'_>,
    right: Strided<'_>,
    terms: impl Fn(Range<usize>) -> Range<usize>,
) {
    let mut destination = destination;
    let mut row = 0;
    while row < destination.rows {
        // Enough independent sums to hide the latency of an FMA, few enough to stay in registers.
        let height = if S::REGISTER_COUNT >= 32 { 8 } else { 4 };
        let height = if destination.rows - row < height { 1 } else { height };
        let range = terms(row..row + height);
        match height {
            8 => tile_row::<S, 8>(simd, &mut destination, left, right, row, range),
            4 => tile_row::<S, 4>(simd, &mut destination, left, right, row, range),
            _ => tile_row::<S, 1>(simd, &mut destination, left, right, row, range),
        }
        row += height;
    }
}

/// M rows of a product, over its whole width.
#[inline(always)]
fn tile_row<S: Simd, const M: usize>(
    simd: S,
    destination: &mut Destination<'_>,
    left: Left<'_>,
    right: Strided<'_>,
    row: usize,
    range: Range<usize>,
) {
    let mut column = 0;
    while column < destination.width {
        if destination.width - column >= 2 * S::F32_LANES {
            tile::<S, M, 2>(simd, destination, left, right, (row, column), range.clone());
            column += 2 * S::F32_LANES;
        } else {
            tile::<S, M, 1>(simd, destination, left, right, (row, column), range.clone());
            column += S::F32_LANES;
        }
    }
}

/// M rows and N vectors of a product.
#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    destination: &mut Destination<'_>,
    left: Left<'_>,
    right: Strided<'_>,
    (row, column): (usize, usize),
    range: Range<usize>,
) {
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    match left {
        Left::Rows(left) => {
            let rows: [&[f32]; M] = std::array::from_fn(|m| left.row(row + m, range.start, range.len()));
            for k in 0..range.len() {
                let right = right.vectors::<S, N>(range.start + k, column);
                for m in 0..M {
                    let factor = simd.splat_f32s(rows[m][k]);
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(factor, right[n], sums[m][n]);
                    }
                }
            }
        }
        Left::Columns(left) => {
            for k in range {
                let right = right.vectors::<S, N>(k, column);
                let factors = left.row(k, row, M);
                for m in 0..M {
                    let factor = simd.splat_f32s(factors[m]);
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(factor, right[n], sums[m][n]);
                    }
                }
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        let at = (row + m) * destination.stride + column;
        let (out, _) = S::as_mut_simd_f32s(&mut destination.data[at..][..N * S::F32_LANES]);
        for n in 0..N {
            out[n] = match destination.write {
                Write::Replace => sums[n],
                Write::Add => simd.add_f32s(out[n], sums[n]),
            };
        }
    }
}
