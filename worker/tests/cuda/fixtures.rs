//! The model against `transformers`, as `model_fixtures.rs` has it for the CPU.

use std::collections::BTreeMap;

use ndarray::{ArrayView2, s};
use sanderling_common::capacity::{Capacity, CapacityConvention};
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::kernels::cuda::{MemoryNeeded, Precision};
use sanderling_worker::model::{Balancing, Model};

use crate::device::{Place, everywhere, kernels, relative, tolerance};
use crate::fixture::Fixture;

const HALF: Option<Capacity> = Some(Capacity { factor: 0.5, convention: CapacityConvention::Slots });

fn check(name: &'static str, place: Place, precision: Precision) {
    let Some(mut kernels) = kernels(place, precision) else { return };
    let (fixture, tolerance) = (Fixture::load(name), tolerance(precision));
    let mut params = kernels.allocate_factors(fixture.params.len()).unwrap();
    kernels.upload(&fixture.params, &mut params);
    let mut grad = kernels.allocate(fixture.params.len()).unwrap();
    let mut model = Model::new(fixture.config.clone(), kernels).unwrap();
    let ids = fixture.input_ids();
    let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));

    let logits = model.logits(&params, ids.view()).unwrap();
    let logits = relative(logits.as_slice().unwrap(), &fixture.reference("logits"));
    println!("{name}: logits {logits:.1e}");
    assert!(logits < tolerance, "logits differ by {logits}");

    // Twice, so that nothing of one step may be left over for the next, what was dropped included.
    let balanced = Balancing { auxiliary: 1.0, capacity: HALF };
    model.loss_and_grad(&params, inputs, targets, balanced, &mut grad).unwrap();
    let step = model.loss_and_grad(&params, inputs, targets, Balancing::default(), &mut grad).unwrap();
    let loss = (step.cross_entropy / f64::from(fixture.reference("loss")[0]) - 1.0).abs();
    assert!(loss < tolerance, "the loss differs by {loss}");
    let mut values = vec![0.0; fixture.params.len()];
    model.kernels_mut().download(&grad, &mut values).unwrap();
    check_gradients(&fixture, &values, precision);

    // The same over blocks of tokens.
    model.limit_logits(fixture.config.vocab_size * (inputs.len() / 3 + 1));
    let again = model.loss_and_grad(&params, inputs, targets, Balancing::default(), &mut grad).unwrap();
    assert!((again.cross_entropy / step.cross_entropy - 1.0).abs() < tolerance, "{again:?} {step:?}");
    model.kernels_mut().download(&grad, &mut values).unwrap();
    check_gradients(&fixture, &values, precision);
}

/// Of floats every tensor is within the tolerance. With rounded factors the whole gradient is, and each tensor within
/// twice as much, or five times for the experts of a layer taken together and for its router: a token whose two likeliest
/// experts are nearly equal may go to the other one, and a fixture has few tokens.
fn check_gradients(fixture: &Fixture, values: &[f32], precision: Precision) {
    let (layout, tolerance) = (fixture.config.layout().unwrap(), tolerance(precision));
    let mut groups: BTreeMap<String, (Vec<f32>, Vec<f32>)> = BTreeMap::new();
    for tensor in layout.tensors() {
        let group = match (precision, tensor.name.split_once(".experts.")) {
            (Precision::F32, _) | (_, None) => tensor.name.clone(),
            (_, Some((layer, expert))) => {
                format!("{layer}.experts.{}", expert.trim_start_matches(char::is_numeric))
            }
        };
        let (found, expected) = groups.entry(group).or_default();
        found.extend_from_slice(&values[tensor.range()]);
        expected.extend(fixture.gradient(&tensor.name));
    }
    let is_routed = |group: &str| group.contains(".experts.") || group.ends_with(".gate.weight");
    let allowed = |group: &str| match precision {
        Precision::F32 => tolerance,
        Precision::Tf32 | Precision::Bf16 if is_routed(group) => 5.0 * tolerance,
        Precision::Tf32 | Precision::Bf16 => 2.0 * tolerance,
    };
    let deviations = groups.iter().map(|(group, (found, expected))| (relative(found, expected), group));
    let (worst, group) =
        deviations.max_by(|a, b| (a.0 / allowed(a.1)).total_cmp(&(b.0 / allowed(b.1)))).unwrap();
    let (found, expected): (Vec<_>, Vec<_>) = groups.values().cloned().unzip();
    let whole = relative(&found.concat(), &expected.concat());
    let (name, parts) = (fixture.name, groups.len());
    println!("{name}: gradient {whole:.1e}, worst of {parts} parts {worst:.1e} ({group})");
    assert!(whole < tolerance, "the gradient differs by {whole}");
    assert!(worst < allowed(group), "the gradient of {group} differs by {worst}");
}

/// The estimate of memory before the start is what a step takes.
fn memory_is_as_estimated(place: Place, precision: Precision) {
    for name in ["llama-gqa", "mixtral-e8t2", "qwen2moe-e16t4"] {
        let Some(mut kernels) = kernels(place, precision) else { return };
        let fixture = Fixture::load(name);
        let mut params = kernels.allocate_factors(fixture.params.len()).unwrap();
        kernels.upload(&fixture.params, &mut params);
        let mut grad = kernels.allocate(fixture.params.len()).unwrap();
        let mut model = Model::new(fixture.config.clone(), kernels).unwrap();
        let tables = model.kernels_mut().held_bytes();
        let ids = fixture.input_ids();
        let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));
        model.loss_and_grad(&params, inputs, targets, Balancing::default(), &mut grad).unwrap();
        let needed = MemoryNeeded::new(&fixture.config, precision, inputs.len()).unwrap();
        let scratch = model.kernels_mut().scratch_bytes();
        let step = model.kernels_mut().held_bytes() - scratch - tables;
        assert_eq!((step, tables), (needed.step, needed.model + needed.rope), "{name}");
        assert!(scratch <= needed.scratch, "{name}: {scratch} {needed:?}");
    }
}

fn llama_with_grouped_queries(place: Place, precision: Precision) {
    check("llama-gqa", place, precision);
}
fn llama3_rope_with_tied_embeddings(place: Place, precision: Precision) {
    check("llama3-rope-tied", place, precision);
}
fn mixtral(place: Place, precision: Precision) {
    check("mixtral-e8t2", place, precision);
}
fn qwen2_moe(place: Place, precision: Precision) {
    check("qwen2moe-e16t4", place, precision);
}

/// Everything else that a model can be asked for, and a step with dropped tokens and the auxiliary loss: as the CPU has it.
fn the_cpus_model(place: Place, precision: Precision) {
    for name in ["llama-gqa", "mixtral-e8t2", "qwen2moe-e16t4"] {
        let Some(mut kernels) = kernels(place, precision) else { return };
        let (fixture, tolerance) = (Fixture::load(name), tolerance(precision));
        let mut params = kernels.allocate_factors(fixture.params.len()).unwrap();
        kernels.upload(&fixture.params, &mut params);
        let mut model = Model::new(fixture.config.clone(), kernels).unwrap();
        let mut cpu = Model::new(fixture.config.clone(), Cpu::new()).unwrap();
        let ids = fixture.input_ids();
        let (inputs, targets) = (ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]));
        let found = model.evaluate(&params, inputs, targets).unwrap();
        let expected = cpu.evaluate(&fixture.params, inputs, targets).unwrap();
        assert!((found.loss() / expected.loss() - 1.0).abs() < tolerance, "{name}: {found:?}");
        assert_eq!(found.layers.len(), expected.layers.len());
        for (found, expected) in found.layers.iter().zip(&expected.layers) {
            assert!(
                (found.entropy_sum / expected.entropy_sum - 1.0).abs() < tolerance,
                "{found:?} {expected:?}"
            );
            let sums = |layer: &sanderling_worker::model::RouterSums| -> Vec<f32> {
                layer.statistics.probability_sums.iter().map(|&sum| sum as f32).collect()
            };
            assert!(relative(&sums(found), &sums(expected)) < tolerance, "{found:?} {expected:?}");
            let tokens = |layer: &sanderling_worker::model::RouterSums| -> u64 {
                layer.statistics.expert_tokens.iter().sum()
            };
            assert_eq!(tokens(found), tokens(expected));
            assert_eq!(found.statistics.dropped, 0);
        }

        let places = [(1, 0), (0, ids.ncols() - 1), (1, 3)];
        let found = model.logits_at(&params, ids.view(), &places).unwrap().to_owned();
        let expected = cpu.logits_at(&fixture.params, ids.view(), &places).unwrap();
        let deviation = relative(found.as_slice().unwrap(), expected.as_slice().unwrap());
        assert!(deviation < tolerance, "{name}: {deviation}");

        let found = model.token_losses(&params, inputs, targets).unwrap().to_owned();
        let expected = cpu.token_losses(&fixture.params, inputs, targets).unwrap();
        let deviation = relative(found.as_slice().unwrap(), expected.as_slice().unwrap());
        assert!(deviation < tolerance, "{name}: {deviation}");

        let tokens: Vec<u32> = ids.row(0).iter().copied().collect();
        let (first, second) = tokens.split_at(5);
        let (mut cache, mut cpu_cache) =
            (model.new_cache(tokens.len()).unwrap(), cpu.new_cache(tokens.len()).unwrap());
        for part in [first, second] {
            let found = model.extend(&params, &mut cache, part).unwrap().to_vec();
            let deviation = relative(&found, cpu.extend(&fixture.params, &mut cpu_cache, part).unwrap());
            assert!(deviation < tolerance, "{name}: {deviation}");
        }
        steps_with_drops(name, &mut model, &params, &mut cpu, &fixture, (inputs, targets), tolerance);
    }
}

/// With bfloat16 a token near the limit of an expert may be dropped in another's place, so that only floats are compared.
fn steps_with_drops<K: Kernels>(
    name: &str,
    model: &mut Model<K>,
    params: &K::Buffer,
    cpu: &mut Model<Cpu>,
    fixture: &Fixture,
    (inputs, targets): (ArrayView2<'_, u32>, ArrayView2<'_, u32>),
    tolerance: f64,
) {
    let mut grad = model.kernels_mut().allocate(fixture.params.len()).unwrap();
    let mut expected = vec![0.0; fixture.params.len()];
    let balancing = Balancing { auxiliary: 0.5, capacity: HALF };
    let step = model.loss_and_grad(params, inputs, targets, balancing, &mut grad).unwrap();
    let cpu_step = cpu.loss_and_grad(&fixture.params, inputs, targets, balancing, &mut expected).unwrap();
    assert!(
        (step.cross_entropy / cpu_step.cross_entropy - 1.0).abs() < tolerance,
        "{name}: {step:?} {cpu_step:?}"
    );
    assert!(
        (step.auxiliary - cpu_step.auxiliary).abs() <= tolerance * cpu_step.auxiliary,
        "{step:?} {cpu_step:?}"
    );
    assert!((step.dropped - cpu_step.dropped).abs() <= 5.0 * tolerance, "{name}: {step:?} {cpu_step:?}");
    if tolerance < 1e-3 {
        let mut found = vec![0.0; expected.len()];
        model.kernels_mut().download(&grad, &mut found).unwrap();
        let layout = fixture.config.layout().unwrap();
        for tensor in layout.tensors() {
            let deviation = relative(&found[tensor.range()], &expected[tensor.range()]);
            assert!(deviation < tolerance, "{name}: {} differs by {deviation}", tensor.name);
        }
    }
}

everywhere! {
    llama_with_grouped_queries, llama3_rope_with_tied_embeddings, mixtral, qwen2_moe, the_cpus_model,
    memory_is_as_estimated
}
