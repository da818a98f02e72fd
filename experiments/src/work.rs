//! Long work at a desk: a bar on a terminal, and a stop at Ctrl-C that leaves nothing behind.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use sanderling_transport::stop_on_interrupt;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Without a terminal, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Anything else, by its name in the plural.
    Count(&'static str),
}

/// Knows of Ctrl-C: the first asks for a clean end, the second ends the process.
pub struct Stop {
    pressed: watch::Receiver<bool>,
}

/// What listens, from the first time on that anybody asks until the process ends: of a Ctrl-C between two pieces of work the
/// second one would not know otherwise.
static LISTENING: Mutex<Option<(watch::Receiver<bool>, Runtime)>> = Mutex::new(None);

impl Stop {
    /// Listens from now on.
    ///
    /// # Errors
    /// If the system has no thread to listen with.
    pub fn listen() -> anyhow::Result<Self> {
        // Nothing is half done in it where another thread panicked.
        let mut listening = LISTENING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((pressed, _)) = listening.as_ref() {
            return Ok(Self { pressed: pressed.clone() });
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        let pressed = {
            let _inside = runtime.enter();
            stop_on_interrupt(|| {})
        };
        *listening = Some((pressed.clone(), runtime));
        Ok(Self { pressed })
    }

    /// Whether the work is to end.
    pub fn is_asked(&self) -> bool {
        *self.pressed.borrow()
    }
}

/// A piece of work that is under way.
pub struct Work {
    bar: ProgressBar,
    unit: Unit,
    what: String,
    next_line: Instant,
    stop: Stop,
}

impl Work {
    /// Work of `total` units, named by a word or two, such as "writing".
    ///
    /// # Errors
    /// If the system has no thread to listen for Ctrl-C with.
    ///
    /// # Panics
    /// Never: the template is a constant.
    pub fn begin(what: &str, total: u64, unit: Unit) -> anyhow::Result<Self> {
        let stop = Stop::listen()?;
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let template = match unit {
            Unit::Bytes => "{msg} {bar:28.cyan} {bytes}/{total_bytes} {bytes_per_sec} {eta:>4}",
            Unit::Count(_) => "{msg} {bar:28.cyan} {pos}/{len} {per_sec} {eta:>4}",
        };
        let style = ProgressStyle::with_template(template).expect("the template is well formed");
        let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style.progress_chars("━╸─"));
        bar.set_message(what.to_owned());
        Ok(Self { bar, unit, what: what.to_owned(), next_line: Instant::now() + LINE_EVERY, stop })
    }

    /// Notes how far it is; breaks when Ctrl-C was pressed.
    pub fn at(&mut self, done: u64) -> ControlFlow<()> {
        self.bar.set_position(done);
        if self.bar.is_hidden() && Instant::now() >= self.next_line {
            self.next_line = Instant::now() + LINE_EVERY;
            let total = self.bar.length().unwrap_or(done);
            let line = match self.unit {
                Unit::Bytes => format!("{}: {} of {}", self.what, HumanBytes(done), HumanBytes(total)),
                Unit::Count(name) => format!("{}: {done} of {total} {name}", self.what),
            };
            self.say(&line);
        }
        if self.stop.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Writes a line above the bar.
    pub fn say(&self, line: &str) {
        // Nobody is left to tell when standard error is closed.
        self.bar.suspend(|| drop(writeln!(std::io::stderr(), "{line}")));
    }

    /// Says how much it is all together.
    pub fn of(&mut self, total: u64) {
        self.bar.set_length(total);
    }

    /// Becomes true with Ctrl-C.
    pub fn stop(&self) -> watch::Receiver<bool> {
        self.stop.pressed.clone()
    }

    /// Takes the bar away.
    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
