//! Selection and codec against the obvious ways to do them, one thread, 1 % of normally distributed values.
//!
//! `cargo bench -p sanderling-common --bench sparse`. Selections report values per second, codecs entries per
//! second, so that ratios can be read off one run.

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{
    Compression, Compressor, Selector, Update, ValueFormat, decode_into, kept, rice,
};

const LENGTHS: [usize; 2] = [1_000_000, 10_000_000];
const KEEP: f64 = 0.01;

fn main() {
    divan::main();
}

/// Normally distributed values, as a sum of uniform ones.
fn normal(len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut uniform = || rng.next_u32() as f32 / u32::MAX as f32 - 0.5;
    (0..len).map(|_| (0..12).map(|_| uniform()).sum()).collect()
}

mod select {
    use super::*;

    fn bench(bencher: Bencher, len: usize, mut select: impl FnMut(&[f32], usize, &mut Vec<u32>)) {
        let values = normal(len);
        let k = kept(len, KEEP);
        let mut out = Vec::new();
        bencher.counter(ItemsCount::new(len)).bench_local(|| {
            select(black_box(&values), k, &mut out);
            assert_eq!(out.len(), k);
        });
    }

    #[divan::bench(args = LENGTHS)]
    fn selector(bencher: Bencher, len: usize) {
        let mut selector = Selector::default();
        bench(bencher, len, |values, k, out| selector.top_k(values, k, out));
    }

    /// At the server's 5 %.
    #[divan::bench(args = LENGTHS)]
    fn selector_five_percent(bencher: Bencher, len: usize) {
        let mut selector = Selector::default();
        bench(bencher, len, |values, k, out| {
            selector.top_k(values, 5 * k, out);
            out.truncate(k);
        });
    }

    /// Quickselect over a copy for the threshold, then compaction.
    #[divan::bench(args = LENGTHS)]
    fn quickselect_copy(bencher: Bencher, len: usize) {
        let mut copy = Vec::new();
        bench(bencher, len, |values, k, out| {
            copy.clear();
            copy.extend(values.iter().map(|value| value.abs()));
            let (_, &mut threshold, _) = copy.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            out.clear();
            out.extend(
                (0..).zip(values).filter(|(_, value)| value.abs() >= threshold).map(|(index, _)| index),
            );
            out.truncate(k);
        });
    }

    /// What the published implementation does.
    #[divan::bench(args = LENGTHS, sample_count = 5)]
    fn full_sort(bencher: Bencher, len: usize) {
        let mut copy = Vec::new();
        bench(bencher, len, |values, k, out| {
            copy.clear();
            copy.extend(values.iter().map(|value| value.abs()));
            copy.sort_unstable_by(|a, b| b.total_cmp(a));
            let threshold = copy[k - 1];
            out.clear();
            out.extend(
                (0..).zip(values).filter(|(_, value)| value.abs() >= threshold).map(|(index, _)| index),
            );
            out.truncate(k);
        });
    }
}

mod codec {
    use super::*;

    const FORMATS: [ValueFormat; 4] =
        [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8, ValueFormat::Sign];
    const LEN: usize = 10_000_000;

    struct Example {
        layout: Layout,
        update: Update,
        payload: Vec<u8>,
    }

    fn example(format: ValueFormat) -> Example {
        let layout = Layout::new([("tensor", vec![LEN])]).expect("one tensor");
        let mut payload = Vec::new();
        let compression = Compression { keep: KEEP, dense_below: 0, format };
        let update = Compressor::new(compression)
            .compress(&layout, 0..1, &normal(LEN), &mut payload)
            .expect("finite values");
        Example { layout, update, payload }
    }

    #[divan::bench(args = FORMATS)]
    fn decode(bencher: Bencher, format: ValueFormat) {
        let Example { layout, mut update, payload } = example(format);
        bencher.counter(ItemsCount::new(update.entry_count())).bench_local(|| {
            decode_into(&layout, 0..1, black_box(&payload), &mut update).expect("a valid payload");
        });
    }

    /// A server's difference without secondary compression: a scan for what is not zero, and its encoding.
    #[divan::bench]
    fn compress_nonzero(bencher: Bencher) {
        let Example { layout, mut update, mut payload } = example(ValueFormat::F32);
        let dense = update.to_dense(&layout);
        let mut compressor = Compressor::nonzero();
        bencher.counter(ItemsCount::new(LEN)).bench_local(|| {
            payload.clear();
            compressor
                .compress_into(&layout, 0..1, black_box(&dense), 1.0, &mut payload, &mut update)
                .expect("finite values");
        });
    }

    #[divan::bench]
    fn scatter_add(bencher: Bencher) {
        let Example { layout, update, .. } = example(ValueFormat::F32);
        let mut run = vec![0.0; LEN];
        bencher.counter(ItemsCount::new(update.entry_count())).bench_local(|| {
            update.add_to(&layout, black_box(&mut run));
        });
    }
}

mod indices {
    use super::*;

    const LEN: usize = 10_000_000;

    fn indices() -> Vec<u32> {
        let mut indices = Vec::new();
        Selector::default().top_k(&normal(LEN), kept(LEN, KEEP), &mut indices);
        indices
    }

    #[divan::bench]
    fn rice_encode(bencher: Bencher) {
        let (indices, mut bytes) = (indices(), Vec::new());
        bencher.counter(ItemsCount::new(indices.len())).bench_local(|| {
            bytes.clear();
            rice::encode(black_box(&indices), rice::plan(&indices), &mut bytes);
        });
    }

    #[divan::bench]
    fn rice_decode(bencher: Bencher) {
        let indices = indices();
        let (plan, mut bytes, mut out) = (rice::plan(&indices), Vec::new(), Vec::new());
        rice::encode(&indices, plan, &mut bytes);
        bencher.counter(ItemsCount::new(indices.len())).bench_local(|| {
            out.clear();
            rice::decode(black_box(&bytes), plan.parameter(), indices.len(), LEN, &mut out)
                .expect("valid bytes");
        });
        assert_eq!(out, indices);
    }

    /// Gaps in LEB128: the obvious code, a quarter longer.
    #[divan::bench]
    fn leb128_encode(bencher: Bencher) {
        let (indices, mut bytes) = (indices(), Vec::new());
        bencher
            .counter(ItemsCount::new(indices.len()))
            .bench_local(|| leb128(black_box(&indices), &mut bytes));
    }

    #[divan::bench]
    fn leb128_decode(bencher: Bencher) {
        let (indices, mut bytes, mut out) = (indices(), Vec::new(), Vec::new());
        leb128(&indices, &mut bytes);
        bencher.counter(ItemsCount::new(indices.len())).bench_local(|| {
            out.clear();
            let (mut next, mut gap, mut shift) = (0, 0, 0);
            for &byte in black_box(&bytes) {
                gap |= u32::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    out.push(next + gap);
                    next += gap + 1;
                    (gap, shift) = (0, 0);
                }
            }
        });
        assert_eq!(out, indices);
    }

    fn leb128(indices: &[u32], bytes: &mut Vec<u8>) {
        bytes.clear();
        let mut next = 0;
        for &index in indices {
            let mut gap = index - next;
            next = index + 1;
            while gap >= 0x80 {
                bytes.push(gap as u8 | 0x80);
                gap >>= 7;
            }
            bytes.push(gap as u8);
        }
    }
}
