"""Drawing images with a MODEL as ComfyUI's KSampler does, with the time that the steps take."""

import time

import comfy.sample


def draw(model, vae, positive, negative, latent, seed, steps, cfg, sampler, scheduler, denoise, step):
    """(IMAGE, seconds) of a MODEL, with the inputs of KSampler and VAE Decode.

    step: called after each step with its number, from 1; may raise to cancel. The seconds are those of all steps without loading the model
    and compiling kernels: the first step, which includes both, counts as much as the others do on average.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    times = [time.perf_counter()]

    def after_step(number, denoised, *_):
        float(denoised.flatten()[0])  # waits for the GPU
        times.append(time.perf_counter())
        step(number + 1)

    samples = comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, samples, denoise=denoise,
                                  noise_mask=latent.get("noise_mask"), callback=after_step, disable_pbar=True, seed=seed)
    first, *later = times[1:] or times
    return vae.decode(samples), (times[-1] - first) * (len(later) + 1) / len(later) if later else first - times[0]
