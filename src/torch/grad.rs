//! Gradient mode of the current thread.

/// Turns gradient recording on or off for the current thread until dropped.
///
/// `tch::no_grad(f)` and `tch::with_grad(f)` leave the mode changed when `f` panics; this guard
/// restores it while unwinding. Not to be held across an await: the mode belongs to the thread.
#[must_use = "the mode is restored when the guard is dropped"]
pub struct GradGuard {
    before: bool,
    // Gradient mode is thread-local: the guard must be dropped where it was made.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl GradGuard {
    pub fn set(enabled: bool) -> Self {
        Self { before: set_enabled(enabled), _not_send: std::marker::PhantomData }
    }
}

impl Drop for GradGuard {
    fn drop(&mut self) {
        set_enabled(self.before);
    }
}

fn set_enabled(enabled: bool) -> bool {
    // SAFETY: sets a thread-local flag of libtorch and returns the one before; no pointers.
    unsafe { torch_sys::at_grad_set_enabled(i32::from(enabled)) != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_is_restored_after_a_panic() {
        let _outer = GradGuard::set(false);
        let unwound = std::panic::catch_unwind(|| {
            let _inner = GradGuard::set(true);
            panic!("inside");
        });
        assert!(unwound.is_err());
        assert!(!set_enabled(false), "gradient mode leaked out of the panicking scope");
    }
}
