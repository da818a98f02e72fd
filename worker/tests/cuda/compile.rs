//! Every kernel compiles, for every architecture that it is meant for: NVRTC needs no GPU.

use sanderling_worker::kernels::cuda::{Library, Precision, Target, Unit, compile_to_ptx, missing_library};

use crate::skip;

#[test]
fn kernels_compile() {
    if let Some(library) = missing_library(&[Library::Nvrtc]) {
        skip::skip("nvrtc", &format!("no kernel was compiled, as {library} is not there"));
        return;
    }
    for unit in Unit::ALL {
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            if unit.is_for_hopper() && precision != Precision::Bf16 {
                continue;
            }
            for architecture in ["compute_80", "compute_90", "compute_90a"] {
                let hopper = architecture == "compute_90a";
                if unit.is_for_hopper() && !hopper {
                    continue;
                }
                // Only attention has another form for less shared memory, which Hopper does not lack.
                let is_attention = matches!(unit, Unit::Attention { .. });
                for small_shared in
                    [false, true].into_iter().filter(|small| !small || is_attention && !hopper)
                {
                    let target = Target { small_shared, hopper_experts: hopper, hopper_attention: hopper };
                    let code = compile_to_ptx(&unit.source(precision, target), architecture);
                    let code = code.unwrap_or_else(|error| panic!("{error}"));
                    assert!(String::from_utf8_lossy(&code).contains(".entry"), "{unit:?} has no kernels");
                }
            }
        }
    }
}
