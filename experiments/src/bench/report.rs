//! What was measured, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::step::Measured;

/// Kernels that a table names; the others share a row.
const KERNELS_SHOWN: usize = 16;

/// What a device can do at best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Peak {
    /// FLOP/s.
    pub(super) flops: f64,
    /// Where the number is from.
    pub(super) source: &'static str,
}

/// What was measured of what.
pub(super) struct Report<'a> {
    /// `default`, `dense`, …
    pub(super) shape: &'static str,
    /// Its size, in words.
    pub(super) what: String,
    /// The device and what it multiplies.
    pub(super) device: String,
    pub(super) precision: String,
    pub(super) batch: usize,
    /// Tokens of a sequence.
    pub(super) context: usize,
    /// Of the whole model; none of the expert layer alone, which is told by its sizes in `what`.
    pub(super) layers: Option<usize>,
    pub(super) parameters: Option<usize>,
    /// Of one step, attention counted as causal, and in full.
    pub(super) flops: (f64, f64),
    pub(super) peak: Option<Peak>,
    /// What was estimated before.
    pub(super) needed_bytes: usize,
    pub(super) measured: &'a Measured,
}

impl Report<'_> {
    fn tokens(&self) -> usize {
        self.batch * self.context
    }

    fn per_second(&self, amount: f64) -> f64 {
        amount / self.measured.median()
    }

    /// Shares of the peak, attention counted as causal, and in full.
    fn mfu(&self) -> Option<(f64, f64)> {
        let peak = self.peak?.flops;
        Some((self.per_second(self.flops.0) / peak, self.per_second(self.flops.1) / peak))
    }

    /// As text, with a table of the kernels.
    pub(super) fn text(&self) -> String {
        let (median, best) = (self.measured.median(), self.measured.seconds[0]);
        let mut text = format!(
            "{}: {}, on {} in {}\n  {} tokens a step: median {} ms, best {} ms, {:.0} tokens/s\n",
            self.shape,
            self.what,
            self.device,
            self.precision,
            self.tokens(),
            milliseconds(median),
            milliseconds(best),
            self.per_second(self.tokens() as f64),
        );
        let rate = |flops: f64| self.per_second(flops) / 1e12;
        match (self.mfu(), self.peak) {
            (Some((causal, full)), Some(peak)) => {
                let _ = writeln!(
                    text,
                    "  {:.2} TFLOP/s, MFU {:.1} % (attention counted as causal), {:.1} % (in full), of {:.1} TFLOP/s ({})",
                    rate(self.flops.0),
                    100.0 * causal,
                    100.0 * full,
                    peak.flops / 1e12,
                    peak.source
                );
            }
            _ => {
                let _ = writeln!(
                    text,
                    "  {:.3} TFLOP/s, attention counted as causal ({:.3} in full); no peak is known for an MFU, give it with --peak",
                    rate(self.flops.0),
                    rate(self.flops.1)
                );
            }
        }
        if let Some(loss) = self.measured.loss {
            let _ = writeln!(text, "  loss {loss:.4}, of parameters at random");
        }
        text + &self.kernels()
    }

    fn kernels(&self) -> String {
        let spent = &self.measured.kernels;
        let total: f64 = spent.values().map(|spent| spent.ms).sum();
        let mut kernels: Vec<_> = spent.iter().collect();
        kernels.sort_by(|a, b| b.1.ms.total_cmp(&a.1.ms));
        let mut text = String::new();
        let mut line = |name: &str, ms: f64, calls: u64| {
            let _ = writeln!(
                text,
                "  {name:<40}{ms:>10.3} ms {:>5.1} %{calls:>7} calls {:>10.1} µs/call",
                100.0 * ms / total,
                1e3 * ms / calls.max(1) as f64
            );
        };
        let (shown, rest) = kernels.split_at(kernels.len().min(KERNELS_SHOWN));
        shown.iter().for_each(|(name, spent)| line(name, spent.ms, spent.calls));
        if !rest.is_empty() {
            let (ms, calls) =
                rest.iter().fold((0.0, 0), |(ms, calls), (_, spent)| (ms + spent.ms, calls + spent.calls));
            line(&format!("{} others", rest.len()), ms, calls);
        }
        line("all kernels", total, spent.values().map(|spent| spent.calls).sum());
        text
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let kernels: serde_json::Map<String, Value> = (self.measured.kernels.iter())
            .map(|(&name, spent)| (name.to_owned(), json!({ "ms": spent.ms, "calls": spent.calls })))
            .collect();
        json!({
            "shape": self.shape,
            "device": self.device,
            "precision": self.precision,
            "what": self.what,
            "parameters": self.parameters,
            "layers": self.layers,
            "batch": self.batch,
            "context": self.context,
            "tokens": self.tokens(),
            "median_ms": self.measured.median() * 1e3,
            "best_ms": self.measured.seconds[0] * 1e3,
            "steps_ms": self.measured.seconds.iter().map(|seconds| seconds * 1e3).collect::<Vec<_>>(),
            "tokens_per_second": self.per_second(self.tokens() as f64),
            "tflops_causal": self.per_second(self.flops.0) / 1e12,
            "tflops_full": self.per_second(self.flops.1) / 1e12,
            "mfu_causal": self.mfu().map(|(causal, _)| causal),
            "mfu_full": self.mfu().map(|(_, full)| full),
            "peak_tflops": self.peak.map(|peak| peak.flops / 1e12),
            "peak_source": self.peak.map(|peak| peak.source),
            "loss": self.measured.loss,
            "estimated_bytes": self.needed_bytes,
            "kernels": kernels,
        })
    }
}

/// With as many decimals as tell something.
fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 10.0 { format!("{ms:.3}") } else { format!("{ms:.1}") }
}

#[cfg(test)]
mod tests {
    use sanderling_worker::kernels::timed::Spent;

    use super::*;

    fn measured() -> Measured {
        let kernel = |ms: f64| Spent { ms, calls: 2 };
        Measured {
            seconds: vec![0.5, 1.0, 2.0],
            kernels: [("attention", kernel(250.0)), ("product", kernel(750.0))].into(),
            loss: Some(4.25),
        }
    }

    fn report(measured: &Measured, peak: Option<Peak>) -> Report<'_> {
        Report {
            shape: "dense",
            what: "1 parameter".to_owned(),
            device: "a device".to_owned(),
            precision: "bf16".to_owned(),
            batch: 4,
            context: 25,
            layers: Some(2),
            parameters: Some(1),
            flops: (5e11, 6e11),
            peak,
            needed_bytes: 7,
            measured,
        }
    }

    #[test]
    fn rates_are_of_the_median() {
        let measured = measured();
        let report = report(&measured, Some(Peak { flops: 1e12, source: "a sheet" }));
        let text = report.text();
        assert!(text.contains("median 1000.0 ms, best 500.0 ms, 100 tokens/s"), "{text}");
        assert!(
            text.contains("MFU 50.0 % (attention counted as causal), 60.0 % (in full), of 1.0 TFLOP/s"),
            "{text}"
        );
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("/call")).collect();
        assert!(lines[0].contains("product") && lines[0].contains("75.0 %"), "{text}");
        assert!(lines[2].contains("all kernels") && lines[2].contains("1000.000 ms"), "{text}");
        assert_eq!(
            (&report.json()["mfu_full"], &report.json()["peak_source"]),
            (&json!(0.6), &json!("a sheet"))
        );
        assert_eq!((&report.json()["tokens"], &report.json()["context"]), (&json!(100), &json!(25)));
        assert_eq!(report.json()["kernels"]["attention"]["ms"], 250.0);
    }

    #[test]
    fn without_a_peak_there_is_no_mfu() {
        let measured = measured();
        let report = report(&measured, None);
        assert!(report.text().contains("--peak") && report.json()["mfu_causal"].is_null());
    }
}
