//! [`Kernels`] by the launches of the other modules.

use std::ops::Range;

use ndarray::ArrayView2;

use super::buffer::{Memory, decode, encode};
use super::driver::{Operation, Scalar};
use super::{Buffer, Cuda, CudaError, Routing, Tokens};
use crate::kernels::{
    AttentionShape, ExpertWeights, Head, HeadGradient, Kernels, RmsNorm, Rotation, RouterShape,
    RouterStatistics, RowScale, RowScaleGradient, Weights, Write,
};

impl Cuda {
    fn buffer(&mut self, len: usize, scalar: Scalar, twin: bool) -> Result<Box<Buffer>, CudaError> {
        let twin = (twin && scalar != self.activation()).then(|| self.activation());
        Ok(Box::new(Buffer::new(&self.driver, len, scalar, twin)?))
    }
}

impl Kernels for Cuda {
    type Buffer = Buffer;
    type Storage = Box<Buffer>;
    type Tokens = Tokens;
    type Routing = Routing;
    type Error = CudaError;

    fn allocate(&mut self, len: usize) -> Result<Box<Buffer>, CudaError> {
        self.buffer(len, Scalar::Float, false)
    }

    fn allocate_activations(&mut self, len: usize) -> Result<Box<Buffer>, CudaError> {
        self.buffer(len, self.activation(), false)
    }

    fn allocate_factors(&mut self, len: usize) -> Result<Box<Buffer>, CudaError> {
        self.buffer(len, Scalar::Float, true)
    }

    fn allocate_tokens(&mut self, rows: usize) -> Result<Tokens, CudaError> {
        Ok(Tokens { memory: Memory::new(&self.driver, rows * size_of::<u32>())?, rows })
    }

    fn allocate_routing(&mut self, shape: RouterShape) -> Result<Routing, CudaError> {
        Routing::new(&self.driver, shape)
    }

    fn upload_at(&mut self, values: &[f32], buffer: &mut Buffer, first: usize) {
        let bytes = encode(values, buffer.scalar());
        let uploaded = self.driver().upload(&bytes, buffer.at_mut(first..first + values.len()));
        self.attempt(uploaded);
    }

    fn upload_tokens(&mut self, ids: ArrayView2<'_, u32>, tokens: &mut Tokens) {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        let uploaded = self.driver().upload(&bytes, tokens.at(0..ids.len()));
        self.attempt(uploaded);
    }

    fn download(&mut self, buffer: &Buffer, values: &mut [f32]) -> Result<(), CudaError> {
        let mut bytes = vec![0; values.len() * buffer.scalar().bytes()];
        self.fetch(buffer.at(0..values.len()), &mut bytes)?;
        decode(&bytes, buffer.scalar(), values);
        Ok(())
    }

    fn begin_step(&mut self) {
        self.open_step();
    }

    fn end_step(&mut self) {
        self.close_step();
    }

    fn sum(&mut self, values: &Buffer, len: usize) -> Result<f64, CudaError> {
        self.sum_of(values, len)
    }

    fn zero(&mut self, buffer: &mut Buffer, range: Range<usize>) {
        let bytes = range.len() * buffer.scalar().bytes();
        self.operate("zero", Operation::Zero { address: buffer.at_mut(range), bytes });
    }

    fn add(&mut self, len: usize, a: &Buffer, b: &Buffer, out: &mut Buffer) {
        self.add_buffers(len, a, b, out);
    }

    fn product(
        &mut self,
        params: &Buffer,
        weights: Weights,
        rows: usize,
        x: &Buffer,
        y: &mut Buffer,
        write: Write,
    ) {
        self.dense_forward(params, weights, 0..rows, x, y, write);
    }

    fn product_input_gradient(
        &mut self,
        params: &Buffer,
        weights: Weights,
        rows: usize,
        dy: &Buffer,
        dx: &mut Buffer,
        write: Write,
    ) {
        self.dense_input_gradient(params, weights, 0..rows, dy, dx, write);
    }

    fn product_weight_gradient(
        &mut self,
        grad: &mut Buffer,
        weights: Weights,
        rows: usize,
        dy: &Buffer,
        x: &Buffer,
    ) {
        self.dense_weight_gradient(grad, weights, 0..rows, dy, x, Write::Replace);
    }

    fn add_bias(&mut self, params: &Buffer, bias: Range<usize>, rows: usize, y: &mut Buffer) {
        self.bias(params, bias, rows, y);
    }

    fn bias_gradient(&mut self, grad: &mut Buffer, bias: Range<usize>, rows: usize, dy: &Buffer) {
        self.bias_backward(grad, bias, rows, dy);
    }

    fn expert_product(
        &mut self,
        params: &Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        x: &Buffer,
        y: &mut Buffer,
    ) {
        self.expert_forward(params, weights, routing, x, y);
    }

    fn expert_product_input_gradient(
        &mut self,
        params: &Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        dy: &Buffer,
        dx: &mut Buffer,
    ) {
        self.expert_input_gradient(params, weights, routing, dy, dx);
    }

    fn expert_product_weight_gradient(
        &mut self,
        grad: &mut Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        dy: &Buffer,
        x: &Buffer,
    ) {
        self.expert_weight_gradient(grad, weights, routing, dy, x);
    }

    fn rms_norm(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        x: &Buffer,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        self.norm(norm, params, x, y, inverse_rms);
    }

    fn add_rms_norm(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        inputs: (&Buffer, &Buffer),
        sum: &mut Buffer,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        self.add_norm(norm, params, inputs, sum, y, inverse_rms);
    }

    fn rms_norm_backward(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        saved: (&Buffer, &Buffer),
        dy: &Buffer,
        dx: &mut Buffer,
        grad: &mut Buffer,
    ) {
        self.norm_backward(norm, params, saved, dy, dx, grad);
    }

    fn rotary(&mut self, shape: AttentionShape, tables: &Buffer, rotation: Rotation, qkv: &mut Buffer) {
        self.rotate(shape, tables, rotation, qkv);
    }

    fn attention(&mut self, shape: AttentionShape, qkv: &Buffer, out: &mut Buffer, statistics: &mut Buffer) {
        self.attend(shape, qkv, out, statistics);
    }

    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &Buffer,
        saved: (&Buffer, &Buffer),
        dout: &Buffer,
        dqkv: &mut Buffer,
    ) {
        self.attend_backward(shape, qkv, saved, dout, dqkv);
    }

    fn cached_attention(
        &mut self,
        shape: AttentionShape,
        past: usize,
        tables: &Buffer,
        qkv: &mut Buffer,
        cache: &mut Buffer,
        out: &mut Buffer,
    ) {
        self.attend_cached(shape, past, tables, qkv, cache, out);
    }

    fn swiglu(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScale<'_, Routing, Buffer>,
        gate_up: &Buffer,
        out: &mut Buffer,
    ) {
        let (scale, used) = match scale {
            RowScale::One => (0, 0),
            RowScale::Router(routing) => (routing.weights(), routing.used()),
            RowScale::Gate(gate) => (gate.at(0..rows), 0),
        };
        self.gated((rows, width), (scale, used), gate_up, out);
    }

    fn swiglu_backward(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScaleGradient<'_, Routing, Buffer>,
        dout: &Buffer,
        gate_up: &mut Buffer,
    ) {
        let scale = match scale {
            RowScaleGradient::One => (0, 0, 0),
            RowScaleGradient::Router(routing) => {
                (routing.weights(), routing.used(), routing.weight_gradients())
            }
            RowScaleGradient::Gate { gate, gradient } => (gate.at(0..rows), 0, gradient.at_mut(0..rows)),
        };
        self.gated_backward((rows, width), scale, dout, gate_up);
    }

    fn sigmoid(&mut self, len: usize, values: &mut Buffer) {
        self.sigmoid_of(len, values);
    }

    fn sigmoid_backward(&mut self, len: usize, sigma: &Buffer, gradient: &mut Buffer) {
        self.sigmoid_gradient(len, sigma, gradient);
    }

    fn route(&mut self, shape: RouterShape, logits: &Buffer, routing: &mut Routing) {
        self.choose(shape, logits, routing);
    }

    fn router_backward(&mut self, auxiliary: f32, routing: &Routing, dlogits: &mut Buffer) {
        self.choose_backward(auxiliary, routing, dlogits);
    }

    fn router_statistics(
        &mut self,
        routing: &Routing,
        statistics: &mut RouterStatistics,
    ) -> Result<(), CudaError> {
        self.routed(routing, statistics)
    }

    fn router_entropy(&mut self, routing: &Routing) -> Result<f64, CudaError> {
        self.entropy(routing)
    }

    fn permute(&mut self, routing: &Routing, width: usize, x: &Buffer, sorted: &mut Buffer) {
        self.sort_rows(routing, width, x, sorted);
    }

    fn unpermute(&mut self, routing: &Routing, width: usize, sorted: &Buffer, out: &mut Buffer) {
        self.sum_slots(routing, width, sorted, out);
    }

    fn embed(&mut self, params: &Buffer, table: Weights, rows: usize, tokens: &Tokens, out: &mut Buffer) {
        self.look_up(params, table, rows, tokens, out);
    }

    fn embed_backward(
        &mut self,
        grad: &mut Buffer,
        table: Weights,
        rows: usize,
        tokens: &Tokens,
        dout: &Buffer,
    ) {
        self.look_up_backward(grad, table, rows, tokens, dout);
    }

    fn cross_entropy(
        &mut self,
        (rows, vocabulary): (usize, usize),
        targets: &Tokens,
        gradient_scale: Option<f32>,
        logits: &mut Buffer,
        losses: &mut Buffer,
    ) {
        self.loss((0..rows, vocabulary), targets, gradient_scale, logits, losses);
    }

    fn head_loss(
        &mut self,
        params: &Buffer,
        head: Head,
        inputs: (&Buffer, &Tokens),
        logits: &mut Buffer,
        losses: &mut Buffer,
        gradient: Option<HeadGradient<'_, Buffer>>,
    ) {
        self.head(params, head, inputs, logits, losses, gradient);
    }
}
