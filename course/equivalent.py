"""Mutants that change nothing, with the reason: what course/mutants.py does not list.

{paper: [(the line without its comment, the change, why no test can tell)]}
"""
EQUIVALENT = {
    "ddpm": [
        (
            "alpha_bar = (1 - betas).cumprod(0)",
            "0 -> -1",
            "it has one dimension",
        ),
        (
            "if torch.is_tensor(t) and t.ndim > 0:",
            "0 -> -1",
            "t is a number, with or without a tensor around it, or has four dimensions",
        ),
        (
            "if torch.is_tensor(t) and t.ndim > 0:",
            "0 -> 1",
            "t is a number, with or without a tensor around it, or has four dimensions",
        ),
        (
            "if torch.is_tensor(t) and t.ndim > 0:",
            "t.ndim > 0 -> t.ndim >= 0",
            "t is a number, with or without a tensor around it, or has four dimensions",
        ),
        (
            "upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))",
            "x_0 > 0.999 -> x_0 >= 0.999",
            "no pixel has that value",
        ),
        (
            "lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))",
            "x_0 < -0.999 -> x_0 <= -0.999",
            "no pixel has that value",
        ),
    ],
    "iddpm": [
        (
            "before = same_t.tril(-1).sum(1)",
            "1 -> 0",
            "every ring is filled from its second place on",
        ),
        (
            "self.count.index_add_(0, i, torch.ones_like(i))",
            "0 -> -1",
            "it has one dimension",
        ),
        (
            "early = range(1, T // int(spec[3:]) + 1)",
            "1 -> 2",
            "t = 1 is always kept",
        ),
    ],
    "pdm": [
        (
            "z_z = z.square().sum(1, keepdim=True)",
            "z.square() -> z",
            "the softmax does not see what all images have in common",
        ),
        (
            "variance = (1 - alpha_bar).clamp(min=5e-13)",
            "5e-13 -> 7.5e-13",
            "any small number will do",
        ),
        (
            "return Split(nets, part_of) if split_snr else nets[0]",
            "0 -> -1",
            "there is one network",
        ),
        (
            "alpha_bar = (1 - betas).cumprod(0)",
            "0 -> -1",
            "it has one dimension",
        ),
    ],
    "edm": [
        (
            "return min(self.numbers, key=lambda u: abs(u - sigma))",
            "u - sigma -> sigma - u",
            "a distance has no sign",
        ),
        (
            "log_sigma = self.P_mean + self.P_std * torch.randn(shape, **of)",
            "self.P_mean + self.P_std * torch.randn(shape, **of) -> self.P_mean - "
            "self.P_std * torch.randn(shape, **of)",
            "a normal number and its negative are as likely",
        ),
        (
            "ratio = max(alpha_bar(j - 1) / alpha_bar(j), C_1)",
            "j - 1 -> 1 - j",
            "a squared sine has no sign",
        ),
        (
            "return max(low, getattr(D, \"sigma_min\", 0)), min(high, getattr(D, "
            "\"sigma_max\", math.inf))",
            "0 -> -1",
            "the lowest noise level is above both",
        ),
        (
            "if alpha <= 0 or (t_prime <= 0).any() or not (path.sigma(t_prime) > 0).all():",
            "0 -> -1 #3",
            "sigma(t) is 0 at t = 0 and there alone, which the condition beside it refuses",
        ),
        (
            "if alpha <= 0 or (t_prime <= 0).any() or not (path.sigma(t_prime) > 0).all():",
            "path.sigma(t_prime) > 0 -> path.sigma(t_prime) >= 0",
            "sigma(t) is 0 at t = 0 and there alone, which the condition beside it refuses",
        ),
        (
            "if alpha <= 0 or (t_prime <= 0).any() or not (path.sigma(t_prime) > 0).all():",
            "t_prime <= 0 -> t_prime < 0",
            "sigma(t) is 0 at t = 0 and there alone, which the condition beside it refuses",
        ),
        (
            "t = rounded(D, sigma_steps(steps, \"edm\", sigma_min, sigma_max, "
            "rho)).flip(0).tolist()",
            "0 -> -1",
            "it has one dimension",
        ),
        (
            "return min(self.numbers, key=lambda known: abs(known - sigma))",
            "known - sigma -> sigma - known",
            "a distance has no sign",
        ),
        (
            "grid = nn.functional.affine_grid(theta, [B, 1, H, W], align_corners=False)",
            "1 -> 2",
            "a grid has no channels",
        ),
        (
            "uniform = torch.rand(B, 12, device=device)",
            "12 -> 11",
            "more numbers than are used",
        ),
        (
            "uniform = torch.rand(B, 12, device=device)",
            "12 -> 13",
            "more numbers than are used",
        ),
        (
            "normal = torch.randn(B, 4, device=device)",
            "4 -> 5",
            "more numbers than are used",
        ),
        (
            "on = (uniform[:, :6] < p).float()",
            "6 -> 7",
            "one number more, which nothing reads",
        ),
        (
            "on = (uniform[:, :6] < p).float()",
            "uniform[:, :6] < p -> uniform[:, :6] <= p",
            "a number between is as likely",
        ),
        (
            "flip_x = (uniform[:, 6] < 0.5).float()",
            "uniform[:, 6] < 0.5 -> uniform[:, 6] <= 0.5",
            "a number between is as likely",
        ),
        (
            "flip_y = on[:, 1] * (uniform[:, 7] < 0.5)",
            "1 -> 0",
            "a number of its own either way: mirroring in x has no switch",
        ),
        (
            "flip_y = on[:, 1] * (uniform[:, 7] < 0.5)",
            "uniform[:, 7] < 0.5 -> uniform[:, 7] <= 0.5",
            "a number between is as likely",
        ),
        (
            "angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)",
            "1 -> 0",
            "a full turn, evenly, either way",
        ),
        (
            "angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)",
            "1 -> 2",
            "a full turn, evenly, either way",
        ),
        (
            "angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)",
            "2 * uniform[:, 8] - 1 -> 1 - 2 * uniform[:, 8]",
            "a full turn, evenly, either way",
        ),
        (
            "angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)",
            "2 * uniform[:, 8] - 1 -> 2 * uniform[:, 8]",
            "a full turn, evenly, either way",
        ),
        (
            "angle = on[:, 3] * math.pi * (2 * uniform[:, 8] - 1)",
            "2 * uniform[:, 8] - 1 -> 2 * uniform[:, 8] + 1",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "1 -> 0",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "1 -> 2",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "2 * uniform[:, 9] - 1 -> 1 - 2 * uniform[:, 9]",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "2 * uniform[:, 9] - 1 -> 2 * uniform[:, 9]",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "2 * uniform[:, 9] - 1 -> 2 * uniform[:, 9] + 1",
            "a full turn, evenly, either way",
        ),
        (
            "axis = on[:, 4] * math.pi * (2 * uniform[:, 9] - 1)",
            "9 -> 10",
            "a number of its own either way",
        ),
        (
            "back = back @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves))",
            "back @ scale(2 ** (-0.2 * octaves), 2 ** (-0.2 * octaves)) -> back * scale(2 "
            "** (-0.2 * octaves), 2 ** (-0.2 * octaves))",
            "of diagonal matrices both products are one",
        ),
        (
            "back = back @ scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch))",
            "scale(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)) -> scale(2 ** (0.2 * "
            "stretch), 2 ** (-0.2 * stretch))",
            "its sign is as likely, and Table 6 does not label it",
        ),
        (
            "return (levels - torch.as_tensor(sigma).to(levels)[..., None]).abs().argmin(-1)",
            "levels - torch.as_tensor(sigma).to(levels)[..., None] -> "
            "torch.as_tensor(sigma).to(levels)[..., None] - levels",
            "a distance has no sign",
        ),
        (
            "if torch.is_tensor(sigma) and sigma.ndim > 0:",
            "0 -> -1",
            "sigma is a number, with or without a tensor around it, or has four dimensions",
        ),
        (
            "if torch.is_tensor(sigma) and sigma.ndim > 0:",
            "0 -> 1",
            "sigma is a number, with or without a tensor around it, or has four dimensions",
        ),
        (
            "if torch.is_tensor(sigma) and sigma.ndim > 0:",
            "sigma.ndim > 0 -> sigma.ndim >= 0",
            "sigma is a number, with or without a tensor around it, or has four dimensions",
        ),
    ],
    "patch_diffusion": [
        (
            "if len(corner) != 2 or len(image) not in (0, 2) or min(image, default=1) < 1:",
            "1 -> 2",
            "without a size given, any number from 1 on will do",
        ),
    ],
}
