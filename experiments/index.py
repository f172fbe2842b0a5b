"""The index of equations, as COURSE.md prints it:   python experiments/index.py

Reads the tags that end the paper files' lines, and for each function the test named in TESTS below, which tests/mutants.py shows to notice bugs there.
"""
import ast
import re
from pathlib import Path

HERE = Path(__file__).parent.parent
PAPERS = ("ddpm", "iddpm", "pdm", "edm", "patch_diffusion")
TAG = re.compile(r"#\s+((?:DDPM |DDIM |IDDPM |EDM )?(?:Eqs?\. |Algorithm |Table |Sec\. |App\. |SNR\(|Training targets|Loss weight|Optimal prediction).*)$")

TESTS = {
    "ddpm": dict(linear_betas="test_linear_betas_are_the_authors", q_sample="test_q_sample_is_the_signal_times_sqrt_alpha_bar_plus_noise_times_the_rest",
                 q_posterior="test_the_posterior_has_the_authors_coefficients_and_variance", beta_tilde="test_the_posterior_has_the_authors_coefficients_and_variance",
                 beta="test_the_posterior_has_the_authors_coefficients_and_variance", loss="test_the_loss_of_the_exact_network_is_the_posterior_variance_of_the_noise",
                 x_0_hat="test_predict_undoes_q_sample_when_the_noise_is_known", p_mean_variance="test_without_clipping_the_mean_is_equation_11",
                 log_variance="test_the_posterior_has_the_authors_coefficients_and_variance", sample="test_ten_step_chains_are_the_authors",
                 bits_per_dim="test_the_bound_of_the_exact_network_is_its_closed_form", vlb_term="test_the_terms_of_the_bound_are_the_authors",
                 discretized_gaussian_log_likelihood="test_the_decoder_likelihood_is_the_authors"),
    "iddpm": dict(cosine_betas="test_cosine_betas_are_the_authors", log_variance="test_v_runs_from_beta_tilde_at_minus_one_to_beta_at_one", loss="test_the_losses_are_the_authors",
                  draw_t="test_l_vlb_is_the_sum_of_the_terms_however_t_is_drawn", sample="test_the_ten_step_chain_with_learned_variance_is_the_authors",
                  probabilities="test_importance_sampling_follows_the_root_mean_square_of_the_last_ten_losses", space_timesteps="test_likelihoods_on_a_short_chain_keep_every_early_step"),
    "pdm": dict(posterior_mean="test_the_posterior_mean_is_the_data_weighted_by_how_well_they_explain_x_t", __init__="test_a_cut_in_snr_belongs_to_the_noisier_part_and_each_part_sees_its_own_steps_only",
                snr="test_the_weight_of_each_step_is_this_function_of_its_snr", gamma="test_the_weight_of_each_step_is_this_function_of_its_snr",
                x_0_and_v="test_every_target_leads_back_to_the_same_x", loss="test_the_loss_is_the_weighted_error_in_x"),
    "edm": dict(vp_sigma="test_the_noise_levels_are_the_authors", vp_sigma_inverse="test_the_coefficients_are_the_authors",
                iddpm_levels="test_the_iddpm_levels_are_the_authors_and_those_of_the_cosine_schedule", sigma_steps="test_the_noise_levels_are_the_authors",
                schedule_and_scaling="test_every_choice_of_sampler_gives_the_authors_numbers", ode_sample="test_every_choice_of_sampler_gives_the_authors_numbers",
                ode_invert="test_inverting_and_sampling_gives_the_image_back", coefficients="test_the_coefficients_are_the_authors",
                D="test_the_preconditionings_of_one_optimal_network_agree_on_D", loss="test_the_weighted_error_is_the_authors", draw_sigma="test_each_column_trains_at_its_own_noise_levels",
                lambda_="test_the_weighted_error_is_the_authors", __init__="test_a_network_trained_on_steps_is_a_denoiser_at_their_noise_levels",
                __call__="test_a_network_trained_on_steps_is_a_denoiser_at_their_noise_levels", augment="test_the_labels_tell_exactly_where_each_pixel_came_from"),
    "patch_diffusion": dict(coordinates="test_the_corners_are_exactly_minus_1_and_1_and_x_comes_first", patch_sizes="test_the_shares_are_p_three_fifths_and_two_fifths_of_the_rest",
                            random_crop="test_a_crop_is_a_window_of_the_image_not_resized_and_its_coordinates_that_window_of_the_grid",
                            progressive_size="test_progressive_sizes_grow_and_keep_their_shares"),
}


def tags(paper):
    """[(tag, name of the function whose line carries it), ...] in the file's order."""
    source = (HERE / f"{paper}.py").read_text()
    spans = [(node.lineno, node.end_lineno, node.name) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = []
    for k, line in enumerate(source.splitlines(), 1):
        if match := TAG.search(line):
            inside = [(start - end, name) for start, end, name in spans if start <= k <= end]
            found.append((match[1].strip(), min(inside)[1] if inside else "the file's head"))
    return found


def index():
    rows = ["| file | equation | function | test |", "|---|---|---|---|"]
    for paper in PAPERS:
        for tag, function in dict.fromkeys(tags(paper)):
            rows.append(f"| {paper}.py | {tag} | `{function}` | `{TESTS[paper][function]}` |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(index(), end="")
