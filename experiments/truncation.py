"""Fine solutions of EDM's ODE, and single steps beside them."""
from edm import noise_range, ode_sample, sigma_of_each, widest_float
from plumbing.device import seeded_noise


def noise_of(method, shape, n):
    """(n, C, H, W), in the widest float that the method's device has."""
    device = next(method.parameters()).device
    empty = next(method.parameters()).new_empty(n, *shape)
    noise = seeded_noise([(0, i) for i in range(n)])(empty)
    return noise.to(widest_float(device))


def reference(D, noise, steps, rho):
    """x at each noise level of a fine solution, the first is the noise itself."""
    sigma_max = noise_range("edm", None, None, D)[1]
    xs = [sigma_max * noise]
    xs += [x for x, _ in ode_sample(D, noise, steps=steps, rho=rho)]
    return xs


def heun_step(D, x, t, t_next):
    """One step of Algorithm 1 from x at the noise level t."""
    d = (x - D(x, sigma_of_each(t, x), None)) / t
    x_next = x + (t_next - t) * d
    d_prime = (x_next - D(x_next, sigma_of_each(t_next, x), None)) / t_next
    return x + (t_next - t) * (d + d_prime) / 2


def rmse(x, y):
    return (x - y).double().square().mean().sqrt().item()
