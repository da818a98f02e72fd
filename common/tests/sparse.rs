//! Selection against sorting, and what is sent against what is received.

use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{
    Compression, Compressor, DecodeError, Entries, NonFinite, Selection, Selector, Update, ValueFormat,
    decode, kept, payload_bytes_max,
};

const FORMATS: [ValueFormat; 4] = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8, ValueFormat::Sign];

/// The definition: sort by magnitude, then by index.
fn top_k_by_sorting(values: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].abs().total_cmp(&values[a as usize].abs()).then(a.cmp(&b)));
    order.truncate(k);
    order.sort();
    order
}

fn check_top_k(values: &[f32], k: usize) {
    let mut selected = vec![7];
    Selector::default().top_k(values, k, &mut selected);
    assert_eq!(selected, top_k_by_sorting(values, k), "{k} of {}", values.len());
}

/// Few distinct values, so that ties are the rule.
fn tied() -> impl Strategy<Value = f32> {
    let denormal = f32::from_bits(1);
    prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, denormal, -denormal, 2.5, f32::MAX, f32::MIN])
}

fn finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite())
}

/// How the values of a long tensor are distributed.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Normal,
    Equal,
    Tied,
    Zero,
    /// One value in 50 is not zero.
    Sparse,
    Ascending,
    Descending,
    /// All large values side by side, so that a sample misjudges them.
    Clustered,
    /// Whole rows of 64 are zero.
    Rows,
}

fn shape() -> impl Strategy<Value = Shape> {
    use Shape::*;
    prop::sample::select(vec![Normal, Equal, Tied, Zero, Sparse, Ascending, Descending, Clustered, Rows])
}

fn long_tensor(shape: Shape, len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = move || rng.next_u32() as f32 / u32::MAX as f32 - 0.5;
    let value = |index: usize| {
        let normal: f32 = (0..12).map(|_| uniform()).sum();
        match shape {
            Shape::Normal => normal,
            Shape::Equal => normal.signum(),
            Shape::Tied => (normal * 2.0).round(),
            Shape::Zero => 0.0 * normal,
            Shape::Sparse => normal * f32::from((index * 7919).is_multiple_of(50)),
            Shape::Ascending => index as f32,
            Shape::Descending => -((len - index) as f32),
            Shape::Clustered => normal + 100.0 * f32::from((5000..5700).contains(&index)),
            Shape::Rows => normal * f32::from((index / 64).is_multiple_of(20)),
        }
    };
    (0..len).map(value).collect()
}

proptest! {
    #[test]
    fn selection_is_what_sorting_selects(
        values in prop_oneof![
            prop::collection::vec(tied(), 1..100),
            prop::collection::vec(finite(), 1..100),
        ],
        fraction in 0_f64..=1.0,
    ) {
        check_top_k(&values, kept(values.len(), fraction));
        check_top_k(&values, values.len());
        check_top_k(&values, 0);
    }

    #[test]
    fn selection_from_long_tensors_is_what_sorting_selects(
        shape in shape(),
        len in 8_000_usize..40_000,
        fraction in prop::sample::select(vec![0.0, 0.001, 0.01, 0.05, 0.2, 0.9, 1.0]),
        seed in any::<u64>(),
    ) {
        check_top_k(&long_tensor(shape, len, seed), kept(len, fraction));
    }
}

#[test]
fn ties_go_to_the_lower_index_and_signs_do_not_count() {
    check_top_k(&[-0.0, 0.0, -0.0, 0.0], 2);
    check_top_k(&[1.0, -1.0, 1.0, -2.0, 2.0, -1.0], 4);
    let mut selected = Vec::new();
    Selector::default().top_k(&[0.0, -3.0, 3.0, -0.0, 3.0], 2, &mut selected);
    assert_eq!(selected, [1, 2]);
    Selector::default().top_k(&[0.0, -0.0, 3.0, 0.0], 3, &mut selected);
    assert_eq!(selected, [0, 1, 2]);
}

#[test]
fn a_selector_forgets_its_last_tensor() {
    let mut selector = Selector::default();
    let mut selected = Vec::new();
    for (shape, len) in
        [(Shape::Normal, 30_000), (Shape::Zero, 9_000), (Shape::Tied, 20), (Shape::Sparse, 25_000)]
    {
        let values = long_tensor(shape, len, 3);
        let k = kept(len, 0.03);
        selector.top_k(&values, k, &mut selected);
        assert_eq!(selected, top_k_by_sorting(&values, k));
    }
}

#[test]
fn kept_counts() {
    assert_eq!([kept(1, 0.01), kept(99, 0.01), kept(200, 0.01), kept(7, 1.0)], [1, 1, 2, 7]);
    // In float64 29/100 · 100 is 28.999…: part of the definition, which the reference traces share.
    assert_eq!(kept(100, 0.29), 28);
}

/// A layout of a few small tensors and a flat vector for it.
fn vector() -> impl Strategy<Value = (Layout, Vec<f32>)> {
    let lens = prop::collection::vec(1_usize..60, 1..6);
    lens.prop_flat_map(|lens| {
        let layout = Layout::new(lens.iter().enumerate().map(|(i, &len)| (format!("t{i}"), vec![len])))
            .expect("a valid layout");
        let len = layout.len();
        let values = prop_oneof![
            prop::collection::vec(tied(), len),
            prop::collection::vec(finite(), len),
            prop::collection::vec(-1_f32..1.0, len),
        ];
        (Just(layout), values)
    })
}

fn compression() -> impl Strategy<Value = Compression> {
    let keep = prop_oneof![Just(1.0), 0.001..=1.0];
    (keep, prop::sample::select(vec![0, 20, 1000]), prop::sample::select(&FORMATS[..]))
        .prop_map(|(keep, dense_below, format)| Compression { keep, dense_below, format })
}

/// Both have the same entries with the same bits (`==` takes −0.0 for 0.0).
fn assert_same_bits(a: &Update, b: &Update) {
    assert_eq!(a, b);
    for ((_, a), (_, b)) in a.iter().zip(b.iter()) {
        let bits = |entries: Entries<'_>| match entries {
            Entries::Dense(values) | Entries::Sparse { values, .. } => {
                values.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            }
        };
        assert_eq!(bits(a), bits(b));
    }
}

proptest! {
    #[test]
    fn the_receiver_decodes_what_the_sender_thinks(
        (layout, values) in vector(),
        compression in compression(),
        first in 0_usize..6,
    ) {
        let tensors = first.min(layout.tensors().len() - 1)..layout.tensors().len();
        let source = &values[layout.elements(tensors.clone())];
        for mut compressor in
            [Compressor::new(compression), Compressor::without_zeros(compression), Compressor::nonzero()]
        {
            let mut payload = vec![1, 2, 3];
            let sent = compressor.compress(&layout, tensors.clone(), source, &mut payload).unwrap();
            prop_assert_eq!(&payload[..3], &[1, 2, 3]);
            prop_assert!(payload.len() as u64 - 3 <= payload_bytes_max(&layout));
            let received = decode(&layout, tensors.clone(), &payload[3..]).unwrap();
            assert_same_bits(&sent, &received);
        }
    }

    #[test]
    fn workers_send_exactly_k_and_servers_no_zeros((layout, values) in vector(), compression in compression()) {
        let all = 0..layout.tensors().len();
        let exact = Compression { format: ValueFormat::F32, ..compression };
        let sent = Compressor::new(exact).compress(&layout, all.clone(), &values, &mut Vec::new()).unwrap();
        let difference =
            Compressor::without_zeros(exact).compress(&layout, all, &values, &mut Vec::new()).unwrap();
        prop_assert_eq!(sent.to_dense(&layout), difference.to_dense(&layout));
        for ((tensor, sent), (_, difference)) in sent.iter().zip(difference.iter()) {
            let spec = &layout.tensors()[tensor];
            let source = &values[spec.range()];
            match sent {
                Entries::Dense(values) => prop_assert_eq!(values, source),
                Entries::Sparse { indices, values } => {
                    prop_assert!(spec.len > compression.dense_below);
                    prop_assert_eq!(indices, top_k_by_sorting(source, kept(spec.len, compression.keep)));
                    prop_assert!(indices.iter().zip(values).all(|(&i, &value)| source[i as usize] == value));
                }
            }
            if let Entries::Sparse { values, .. } = difference {
                prop_assert!(values.iter().all(|&value| value != 0.0));
            }
        }
    }

    #[test]
    fn what_was_selected_elsewhere_is_encoded_alike(
        (layout, mut values) in vector(),
        compression in compression(),
        factor in prop::sample::select(vec![1.0_f32, 0.0, 0.3, f32::MAX]),
        bad in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(vec![f32::NAN, f32::INFINITY]))),
    ) {
        if let Some((at, bad)) = bad {
            let at = at.index(values.len());
            values[at] = bad;
        }
        let (mut indices, mut selected) = (Vec::new(), Vec::new());
        for tensor in layout.tensors() {
            let (count, tensor) = (compression.entries(tensor.len), &values[tensor.range()]);
            if count == tensor.len() {
                selected.extend_from_slice(tensor);
            } else {
                let top = top_k_by_sorting(tensor, count);
                selected.extend(top.iter().map(|&index| tensor[index as usize]));
                indices.extend(top);
            }
        }
        let selection = Selection { indices: &indices, values: &selected };
        let (mut payload, mut update) = (vec![7], Update::default());
        let encoded = selection.encode_into(&layout, compression, factor, &mut payload, &mut update);
        let (mut expected_payload, mut expected) = (vec![7], Update::default());
        let tensors = 0..layout.tensors().len();
        let outcome = Compressor::new(compression)
            .compress_into(&layout, tensors, &values, factor, &mut expected_payload, &mut expected);
        prop_assert_eq!(encoded, outcome);
        prop_assert_eq!(payload, expected_payload);
        if outcome.is_ok() {
            assert_same_bits(&update, &expected);
        }
    }

    #[test]
    fn nonzero_sends_everything_in_the_shorter_form((layout, values) in vector()) {
        let mut payload = Vec::new();
        let all = 0..layout.tensors().len();
        let sent = Compressor::nonzero().compress(&layout, all, &values, &mut payload).unwrap();
        prop_assert_eq!(sent.to_dense(&layout), values);
        prop_assert!(payload.len() <= 4 * layout.len() + layout.tensors().len());
    }

    #[test]
    fn a_mutated_payload_is_refused_or_decoded_but_nothing_else(
        (layout, values) in vector(),
        compression in compression(),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let all = 0..layout.tensors().len();
        let mut payload = Vec::new();
        Compressor::new(compression).compress(&layout, all.clone(), &values, &mut payload).unwrap();
        let cut = cut.index(payload.len());
        prop_assert!(decode(&layout, all.clone(), &payload[..cut]).is_err());
        payload.push(0);
        prop_assert_eq!(decode(&layout, all.clone(), &payload), Err(DecodeError::Trailing { bytes: 1 }));
        payload.pop();
        for (place, byte) in mutations {
            let place = place.index(payload.len());
            payload[place] = byte;
        }
        if let Ok(update) = decode(&layout, all.clone(), &payload) {
            prop_assert_eq!(update.tensors(), all);
            prop_assert!(update.to_dense(&layout).iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn parts_of_an_update_apply_as_the_whole((layout, values) in vector(), compression in compression()) {
        let all = 0..layout.tensors().len();
        let update = Compressor::new(compression).compress(&layout, all, &values, &mut Vec::new()).unwrap();
        let (mut whole, mut parts) = (values.clone(), values.clone());
        update.subtract_from(&layout, &mut whole);
        for shard in layout.shards(3) {
            update.part(shard.clone()).subtract_from(&layout, &mut parts[layout.elements(shard)]);
        }
        prop_assert_eq!(&whole, &parts);
        let expected: Vec<f32> = values.iter().zip(update.to_dense(&layout)).map(|(v, q)| v - q).collect();
        prop_assert_eq!(whole, expected);
    }
}

#[test]
fn payloads_of_neighbouring_shards_are_joined_by_concatenation() {
    let layout = Layout::new([("a", vec![50]), ("b", vec![3, 40]), ("c", vec![7]), ("d", vec![90])]).unwrap();
    let values = long_tensor(Shape::Normal, layout.len(), 5);
    let compression = Compression { keep: 0.1, dense_below: 10, format: ValueFormat::Int8 };
    let mut compressor = Compressor::new(compression);
    let (mut whole, mut joined) = (Vec::new(), Vec::new());
    let update = compressor.compress(&layout, 0..4, &values, &mut whole).unwrap();
    for shard in layout.shards(3) {
        let source = &values[layout.elements(shard.clone())];
        compressor.compress(&layout, shard, source, &mut joined).unwrap();
    }
    assert_eq!(joined, whole);
    assert_eq!(update.entry_count(), 5 + 12 + 7 + 9);
}

#[test]
fn selection_is_on_the_source_and_the_factor_on_what_is_sent() {
    let layout = Layout::new([("a", vec![4])]).unwrap();
    let compression = Compression { keep: 0.5, dense_below: 0, format: ValueFormat::F32 };
    let (mut payload, mut update) = (Vec::new(), Update::default());
    Compressor::new(compression)
        .compress_into(&layout, 0..1, &[3.0, -1.0, 0.5, 8.0], 0.25, &mut payload, &mut update)
        .unwrap();
    assert_eq!(update.to_dense(&layout), [0.75, 0.0, 0.0, 2.0]);
}

#[test]
fn what_is_not_finite_is_not_sent() {
    let layout = Layout::new([("a", vec![2]), ("b", vec![3])]).unwrap();
    for (bad, factor) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (f32::MAX, 2.0)] {
        for format in FORMATS {
            let mut compressor = Compressor::new(Compression { keep: 0.1, dense_below: 0, format });
            let (mut payload, mut update) = (vec![9], Update::default());
            let source = [1.0, 2.0, 1.0, bad, 2.0];
            let outcome = compressor.compress_into(&layout, 0..2, &source, factor, &mut payload, &mut update);
            assert_eq!(outcome, Err(NonFinite { tensor: 1 }));
            assert_eq!(payload, [9]);
        }
    }
}
