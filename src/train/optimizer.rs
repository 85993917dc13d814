//! AdamW (Loshchilov & Hutter 2019) over one flat buffer.
//!
//! The matrices of an adapter are many and small; as views of one buffer they are clipped, decayed
//! and moved by a handful of operations, and a checkpoint is three tensors.

use tch::{Device, Kind, Tensor};

use crate::torch::TorchError;

/// Constants of AdamW; betas and epsilon are torch's defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters together; 0 is no limit.
    pub max_grad_norm: f64,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Parameters and the optimizer's state, each `[parameters]` float32 on one device.
pub struct Flat {
    pub parameters: Tensor,
    pub gradient: Tensor,
    pub first_moment: Tensor,
    pub second_moment: Tensor,
    /// Updates made so far.
    pub steps: u64,
    /// Where weight decay acts, `(start, count)`: on matrices alone, as transformers' trainer has it.
    decaying: Vec<(i64, i64)>,
}

impl Flat {
    /// Copies `tensors` side by side into a new buffer; everything else is zero.
    pub fn of(tensors: &[&Tensor], device: Device) -> Result<Self, TorchError> {
        let parts = tensors.iter().map(|t| t.f_detach()?.f_flatten(0, -1)).collect::<Result<Vec<_>, _>>()?;
        let parameters = Tensor::f_cat(&parts, 0)?.f_to_device(device)?.f_to_kind(Kind::Float)?;
        let zeros = || parameters.f_zeros_like();
        let (gradient, first_moment, second_moment) = (zeros()?, zeros()?, zeros()?);
        Ok(Self { gradient, first_moment, second_moment, parameters, steps: 0, decaying: matrices(tensors) })
    }

    /// Leaves of the given shapes that share the parameters' storage: gradients can be asked for
    /// them, and an update of the buffer is an update of them.
    pub fn leaves(&self, shapes: &[Vec<i64>]) -> Result<Vec<Tensor>, TorchError> {
        let mut start = 0;
        let mut leaves = Vec::with_capacity(shapes.len());
        for shape in shapes {
            let count = shape.iter().product();
            let leaf = self.parameters.f_narrow(0, start, count)?.f_view(shape.as_slice())?.f_detach()?;
            leaves.push(leaf.f_set_requires_grad(true)?);
            start += count;
        }
        Ok(leaves)
    }

    /// Views of the gradient in these shapes.
    pub fn gradients(&self, shapes: &[Vec<i64>]) -> Result<Vec<Tensor>, TorchError> {
        let mut start = 0;
        let view = |shape: &Vec<i64>| {
            let count = shape.iter().product();
            start += count;
            Ok(self.gradient.f_narrow(0, start - count, count)?.f_view(shape.as_slice())?)
        };
        shapes.iter().map(view).collect()
    }

    /// Moves the accumulated gradient out; the next one begins at zero.
    pub fn take_gradient(&mut self) -> Result<Vec<f32>, TorchError> {
        let gradient = Vec::try_from(&self.gradient.f_to_device(Device::Cpu)?)?;
        let _ = self.gradient.f_zero_()?;
        Ok(gradient)
    }

    /// Puts a gradient in the place of the accumulated one.
    pub fn put_gradient(&mut self, gradient: &[f32]) -> Result<(), TorchError> {
        // in place: views of it are added to
        Ok(self.gradient.f_copy_(&Tensor::f_from_slice(gradient)?)?)
    }

    /// Adds gradients, in the order of [`Flat::leaves`].
    pub fn accumulate(&mut self, gradients: &[Tensor]) -> Result<(), TorchError> {
        let parts = gradients.iter().map(|t| t.f_flatten(0, -1)).collect::<Result<Vec<_>, _>>()?;
        let _ = self.gradient.f_add_(&Tensor::f_cat(&parts, 0)?)?;
        Ok(())
    }

    /// Adds gradients to their views ([`Flat::gradients`]) one by one, which large ones need less memory for.
    pub fn accumulate_each(views: &[Tensor], gradients: &[Tensor]) -> Result<(), TorchError> {
        for (view, gradient) in views.iter().zip(gradients).filter(|(_, gradient)| gradient.defined()) {
            let _ = view.shallow_clone().f_add_(gradient)?;
        }
        Ok(())
    }

    /// One update with the accumulated gradient times `scale`, which is cleared. Returns the
    /// gradient's norm before clipping; where that is not finite, nothing else has changed.
    pub fn step(&mut self, config: &AdamW, rate: f64, scale: f64) -> Result<f64, TorchError> {
        let mut gradient = self.gradient.f_mul_scalar(scale)?;
        // in place: views of it are added to
        let _ = self.gradient.f_zero_()?;
        let norm = gradient.f_norm()?.f_double_value(&[])?;
        if !norm.is_finite() {
            return Ok(norm);
        }
        if config.max_grad_norm > 0.0 {
            let _ = gradient.f_mul_scalar_((config.max_grad_norm / (norm + 1e-6)).min(1.0))?;
        }
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - BETA1.powi(t), 1.0 - BETA2.powi(t));
        for (start, count) in self.decaying.iter().filter(|_| config.weight_decay > 0.0) {
            let _ = self.parameters.f_narrow(0, *start, *count)?.f_mul_scalar_(1.0 - rate * config.weight_decay)?;
        }
        let _ = self.first_moment.f_lerp_(&gradient, 1.0 - BETA1)?;
        let square = gradient.f_square()?.f_mul_scalar(1.0 - BETA2)?;
        let _ = self.second_moment.f_mul_scalar_(BETA2)?.f_add_(&square)?;
        let scale = self.second_moment.f_sqrt()?.f_div_scalar(correction2.sqrt())?.f_add_scalar(EPSILON)?;
        let change = self.first_moment.f_div(&scale)?.f_mul_scalar(rate / correction1)?;
        let _ = self.parameters.f_sub_(&change)?;
        Ok(norm)
    }
}

/// Stretches of tensors that are no vectors; norms and biases are vectors.
fn matrices(tensors: &[&Tensor]) -> Vec<(i64, i64)> {
    let (mut all, mut start) = (Vec::<(i64, i64)>::new(), 0);
    for tensor in tensors {
        let count = tensor.numel() as i64;
        if tensor.dim() > 1 {
            match all.last_mut() {
                Some((first, length)) if *first + *length == start => *length += count,
                _ => all.push((start, count)),
            }
        }
        start += count;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(values: &[f32]) -> Flat {
        Flat::of(&[&Tensor::from_slice(values).unsqueeze(0)], Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn follows_the_formula() {
        let mut flat = flat(&[1.0, -2.0]);
        let config = AdamW { weight_decay: 0.1, max_grad_norm: 0.0 };
        let (mut p, mut m, mut v) = ([1.0f64, -2.0], [0.0; 2], [0.0; 2]);
        for t in 1..=3 {
            let g = [0.3 * f64::from(t), -0.7];
            flat.accumulate(&[Tensor::from_slice(&[(2.0 * g[0]) as f32, (2.0 * g[1]) as f32])]).unwrap();
            flat.step(&config, 0.01, 0.5).unwrap();
            for i in 0..2 {
                p[i] *= 1.0 - 0.01 * 0.1;
                m[i] = 0.9 * m[i] + 0.1 * g[i];
                v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
                p[i] -= 0.01 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (got, want) in values(&flat.parameters).iter().zip(p) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn leaves_move_with_the_buffer_and_give_gradients() {
        let _grad = crate::torch::GradGuard::set(false);
        let mut flat = flat(&[1.0, 2.0, 3.0]);
        let leaves = flat.leaves(&[vec![1], vec![2, 1]]).unwrap();
        let gradients = {
            let _grad = crate::torch::GradGuard::set(true);
            let loss = &leaves[0].sum(Kind::Float) * 2.0 + leaves[1].square().sum(Kind::Float);
            Tensor::run_backward(&[loss], &leaves, false, false)
        };
        flat.accumulate(&gradients).unwrap();
        assert_eq!(values(&flat.gradient), [2.0, 4.0, 6.0]);
        flat.step(&AdamW { weight_decay: 0.0, max_grad_norm: 1.0 }, 0.5, 1.0).unwrap();
        assert_eq!(values(&leaves[1].flatten(0, -1).detach()), values(&flat.parameters)[1..]);
        assert_ne!(values(&flat.parameters), [1.0, 2.0, 3.0]);
        assert_eq!(values(&flat.gradient), [0.0; 3]);
    }

    #[test]
    fn a_gradient_that_is_no_number_changes_nothing() {
        let mut flat = flat(&[1.0]);
        flat.accumulate(&[Tensor::from_slice(&[f32::NAN])]).unwrap();
        assert!(flat.step(&AdamW { weight_decay: 0.1, max_grad_norm: 1.0 }, 0.5, 1.0).unwrap().is_nan());
        assert_eq!((values(&flat.parameters), flat.steps), (vec![1.0], 0));
        assert_eq!(values(&flat.gradient), [0.0]);
    }
}
