//! The driver's own code, which the emulator does not reach, over libraries that stand in for CUDA's: tests of a GPU, in a process
//! that finds those.

#[cfg(target_os = "linux")]
use crate::skip;
#[cfg(target_os = "linux")]
use crate::standin::Standin;

/// Whether the GPU is one that is stood in for, which takes its time.
pub(crate) fn is_stood_in_for() -> bool {
    std::env::var_os("STANDIN_FOLDER").is_some()
}

#[cfg(target_os = "linux")]
#[test]
fn the_driver_keeps_cudas_rules() {
    gpu_tests_pass_on_a_standin(
        80,
        &[
            "graphs::gpu::steps_by_graphs_are_steps_one_by_one::bf16",
            "graphs::gpu::many_shapes::f32",
            "graphs::gpu_shared::threads_come_to_the_same::bf16",
            "shared::gpu::threads_get_the_same_products::f32",
            "shared::gpu::threads_get_the_same_products::bf16",
            "shared::gpu::timing_that_is_given_up_leaves_nothing::f32",
            "shared::gpu::memory_is_given_back_in_time::f32",
            "shared::a_second_gpu_computes_beside_the_first",
            "fixtures::gpu::mixtral::bf16",
        ],
    );
}

/// Its descriptions of matrices for the copy engine too.
#[cfg(target_os = "linux")]
#[test]
fn the_driver_keeps_cudas_rules_on_hopper() {
    gpu_tests_pass_on_a_standin(
        90,
        &[
            "operations::gpu::expert_products::bf16",
            "operations::gpu::attention::bf16",
            "fixtures::gpu::mixtral::bf16",
        ],
    );
}

#[cfg(target_os = "linux")]
fn gpu_tests_pass_on_a_standin(capability: u32, names: &[&str]) {
    let Some(compiler) = skip::compiler() else { return };
    let run = Standin::new(compiler)
        .command(std::env::current_exe().unwrap())
        .args(names)
        .args(["--exact", "--nocapture"])
        .env("SANDERLING_TESTS_REQUIRE", "gpu,gpus")
        .env("STANDIN_CAPABILITY", capability.to_string())
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{said}\n{errors}");
    assert!(said.contains(&format!("test result: ok. {} passed", names.len())), "{said}");
}
