//! The method's operations in plain loops: what those of devices are tested against.

use std::convert::Infallible;
use std::sync::Arc;

use sanderling_common::layout::Layout;
use sanderling_common::sparse::{self, Compression, Selector, UpdatePart};

use crate::kernels::method::{Accumulate, Incoming, MethodKernels};

/// [`MethodKernels`] on the CPU. Workers there use a [`HostReplica`](crate::core::replica::HostReplica), which has no seam
/// between the method and its vectors.
#[derive(Debug, Default)]
pub struct CpuMethod {
    selector: Selector,
    selected: Vec<u32>,
}

/// Elements of a flat vector, and a value for each.
#[derive(Debug)]
pub struct Entries {
    layout: Arc<Layout>,
    /// Of each tensor, how many; all of them have no indices.
    counts: Vec<usize>,
    indices: Vec<u32>,
    values: Vec<f32>,
}

impl Entries {
    /// Calls `apply` with each element of `vector` that there is an entry of, and its value.
    fn for_each(&self, vector: &mut [f32], mut apply: impl FnMut(&mut f32, f32)) {
        let (mut indices, mut values) = (&self.indices[..], &self.values[..]);
        for (tensor, &count) in self.layout.tensors().iter().zip(&self.counts) {
            let vector = &mut vector[tensor.range()];
            let own;
            (own, values) = values.split_at(count);
            if count == tensor.len {
                vector.iter_mut().zip(own).for_each(|(element, &value)| apply(element, value));
            } else {
                let places;
                (places, indices) = indices.split_at(count);
                places.iter().zip(own).for_each(|(&at, &value)| apply(&mut vector[at as usize], value));
            }
        }
    }
}

impl CpuMethod {
    fn select(&mut self, source: &[f32], compression: Compression, entries: &mut Entries) {
        let Entries { layout, counts, indices, values } = entries;
        counts.clear();
        indices.clear();
        values.clear();
        for tensor in layout.tensors() {
            let (count, source) = (compression.entries(tensor.len), &source[tensor.range()]);
            counts.push(count);
            if count == tensor.len {
                values.extend_from_slice(source);
            } else {
                self.selector.top_k(source, count, &mut self.selected);
                values.extend(self.selected.iter().map(|&at| source[at as usize]));
                indices.extend_from_slice(&self.selected);
            }
        }
    }
}

impl MethodKernels for CpuMethod {
    type Buffer = [f32];
    type Storage = Vec<f32>;
    type Entries = Entries;
    type Error = Infallible;

    fn allocate(&mut self, len: usize) -> Result<Vec<f32>, Infallible> {
        Ok(vec![0.0; len])
    }

    fn allocate_parameters(&mut self, len: usize) -> Result<Vec<f32>, Infallible> {
        self.allocate(len)
    }

    fn allocate_entries(&mut self, layout: &Arc<Layout>) -> Result<Entries, Infallible> {
        let (counts, indices, values) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Entries { layout: layout.clone(), counts, indices, values })
    }

    fn upload(&mut self, values: &[f32], buffer: &mut [f32]) {
        buffer[..values.len()].copy_from_slice(values);
    }

    fn download(&mut self, buffer: &[f32], from: usize, values: &mut [f32]) -> Result<(), Infallible> {
        values.copy_from_slice(&buffer[from..from + values.len()]);
        Ok(())
    }

    fn copy(&mut self, len: usize, from: &[f32], to: &mut [f32]) {
        to[..len].copy_from_slice(&from[..len]);
    }

    fn subtract(&mut self, len: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out[..len].iter_mut().zip(&a[..len]).zip(&b[..len]) {
            *out = a - b;
        }
    }

    fn sum_of_squares(&mut self, len: usize, values: &[f32]) -> Result<f64, Infallible> {
        Ok(values[..len].iter().map(|&value| f64::from(value) * f64::from(value)).sum())
    }

    fn accumulate(
        &mut self,
        incoming: Incoming<'_, [f32]>,
        accumulate: Accumulate<'_, [f32]>,
        compression: Compression,
        entries: &mut Entries,
    ) -> Result<(), Infallible> {
        let Incoming { gradient, scale, weight_decay, theta } = incoming;
        let len = entries.layout.len();
        let decayed = |at: usize, direction: f32| {
            if weight_decay == 0.0 { direction } else { direction + weight_decay * theta[at] }
        };
        let sum = match accumulate {
            Accumulate::Sum { rate, u } => {
                for at in 0..len {
                    u[at] += rate * decayed(at, scale * gradient[at]);
                }
                u
            }
            Accumulate::Momentum { momentum, u, r } => {
                for at in 0..len {
                    u[at] = momentum * u[at] + decayed(at, scale * gradient[at]);
                    r[at] += u[at];
                }
                r
            }
            Accumulate::Normalised { beta2, correction, epsilon, rate, u, v } => {
                for at in 0..len {
                    let gradient = scale * gradient[at];
                    v[at] = beta2 * v[at] + (1.0 - beta2) * (gradient * gradient);
                    u[at] += rate * decayed(at, gradient / ((v[at] * correction).sqrt() + epsilon));
                }
                u
            }
        };
        self.select(sum, compression, entries);
        Ok(())
    }

    fn read(
        &mut self,
        entries: &Entries,
        indices: &mut Vec<u32>,
        values: &mut Vec<f32>,
    ) -> Result<(), Infallible> {
        indices.clone_from(&entries.indices);
        values.clone_from(&entries.values);
        Ok(())
    }

    fn write(&mut self, part: &UpdatePart<'_>, entries: &mut Entries) -> Result<(), Infallible> {
        let tensors = entries.layout.tensors();
        entries.counts.clear();
        entries.counts.resize(tensors.len(), 0);
        entries.indices.clear();
        for (number, sent) in part.iter() {
            entries.counts[number] = sent.len();
            match sent {
                // As many entries as elements are all of them, whichever form they came in.
                sparse::Entries::Sparse { indices, .. } if indices.len() < tensors[number].len => {
                    entries.indices.extend_from_slice(indices);
                }
                _ => {}
            }
        }
        entries.values.clear();
        entries.values.extend_from_slice(part.values());
        Ok(())
    }

    fn write_values(&mut self, values: &[f32], entries: &mut Entries) {
        entries.values.copy_from_slice(values);
    }

    fn add_entries(&mut self, entries: &Entries, vector: &mut [f32]) -> Result<bool, Infallible> {
        let mut finite = true;
        entries.for_each(vector, |element, value| {
            *element += value;
            finite &= element.is_finite();
        });
        Ok(finite)
    }

    fn subtract_entries(&mut self, entries: &Entries, vector: &mut [f32]) {
        entries.for_each(vector, |element, value| *element -= value);
    }

    fn clear_entries(&mut self, entries: &Entries, vector: &mut [f32]) {
        entries.for_each(vector, |element, _| *element = 0.0);
    }
}
