//! The measured half of the report: updates per second.

use std::fmt::Write;

use sanderling_common::method::Method;
use sanderling_server::progress::bytes;

use super::super::lab::{Book, Jobs, plot_both};
use super::link::Kind;
use super::measure::{Measured, Setup, measure};
use super::{Experiment, Half, METHODS, rate_name};
use crate::report::Curve;
use crate::work::Unit;

impl Experiment<'_> {
    fn setup(&self, method: Method, workers: u32, bits_per_second: f64) -> Setup {
        let quick = self.arguments.options.quick;
        Setup {
            method,
            workers,
            bits_per_second,
            compute_ms: self.arguments.compute_ms,
            link: Kind::best(),
            seconds_min: if quick { 8.0 } else { 20.0 },
            updates_min: if quick { 6 } else { 20 },
            seconds_max: if quick { 60.0 } else { 300.0 },
        }
    }

    /// Updates per second over a real link.
    pub(super) fn measured(&self) -> anyhow::Result<Half> {
        let link = match Kind::best() {
            Kind::Namespaces => "Between two network namespaces of Linux, limited by `tc tbf`.",
            Kind::Relay => {
                "Over a relay in one process, which shares the processor with server and workers and is itself a limit at high \
                 rates: this process may not make network namespaces (Linux, root, `ip` and `tc`)."
            }
        };
        let mut text = format!("\n## Updates per second, measured over QUIC\n\n{link}\n\n");
        let rates: &[f64] = if self.arguments.options.quick { &[1e9, 1e8] } else { &[1e9, 1e8, 1e7] };
        let book = Book::<Measured>::open(&self.folder.join("measured"))?;
        let all = METHODS.iter().flat_map(|&method| {
            rates.iter().flat_map(move |&rate| {
                self.workers.iter().map(move |&workers| self.setup(method, workers, rate))
            })
        });
        let wanted: Vec<_> = all.map(|setup| (setup, 1)).collect();
        // One at a time: they share the machine.
        Jobs(1).make_missing(("measuring", Unit::Count("measurements")), &book, &wanted, measure)?;
        let find =
            |method, workers, rate| book.find(&self.setup(method, workers, rate)).expect("it was measured");
        for &rate in rates {
            let _ = write!(
                text,
                "{}:\n\n| workers | ASGD | × one worker | DGS | × one worker | DGS / ASGD | bytes per DGS update up, down |\n\
                 | --- | --- | --- | --- | --- | --- | --- |\n",
                rate_name(rate)
            );
            let one = METHODS.map(|method| find(method, 1, rate).updates_per_second());
            for &workers in self.workers {
                let [asgd, dgs] = METHODS.map(|method| find(method, workers, rate));
                let (a, d) = (asgd.updates_per_second(), dgs.updates_per_second());
                let per = |sent: u64| bytes(sent / dgs.updates.max(1));
                let _ = writeln!(
                    text,
                    "| {workers} | {a:.3} | {:.2} | {d:.3} | {:.2} | {:.2} | {}, {} |",
                    a / one[0],
                    d / one[1],
                    d / a,
                    per(dgs.bytes_up),
                    per(dgs.bytes_down),
                );
            }
            let curves: Vec<Curve> = METHODS
                .iter()
                .map(|&method| Curve {
                    name: method.name().to_owned(),
                    points: (self.workers.iter())
                        .map(|&workers| {
                            (f64::from(workers), find(method, workers, rate).updates_per_second())
                        })
                        .collect(),
                })
                .collect();
            let name = format!("updates-{}", rate_name(rate).replace([' ', '/'], "-").to_lowercase());
            let title = format!("Updates per second at {}", rate_name(rate));
            let picture = plot_both(self.folder, &name, &title, ("workers", "updates per second"), &curves)?;
            let _ = write!(text, "\n{picture}\n");
        }
        if let (Some(&most), true) = (self.workers.last(), rates.contains(&1e9)) {
            let speed_up = find(Method::Dgs, most, 1e9).updates_per_second()
                / find(Method::Dgs, 1, 1e9).updates_per_second();
            let ratio = find(Method::Dgs, 8, 1e9).updates_per_second()
                / find(Method::Asgd, 8, 1e9).updates_per_second();
            let _ = writeln!(
                text,
                "At 1 Gbit/s {most} DGS workers make {speed_up:.1} times the updates of one (the paper: 12.6 with 16), and 8 make \
                 {ratio:.1} times those of ASGD (the paper: 5.7 times the speed, with secondary compression)."
            );
        }
        Ok(Half { text, verdict: String::new() })
    }
}
