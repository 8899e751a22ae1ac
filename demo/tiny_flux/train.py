"""Train the small FLUX and its VAE on pictures from scenes.py, and save files that ComfyUI loads.

    python -m demo.tiny_flux.train --comfyui ~/ComfyUI --out demo/tiny_flux

Run it from the repository's root, on a CUDA GPU with 40 GB. It writes tiny_vae.safetensors and tiny_flux.safetensors into --out, and also
training-vae.json and training-flow.json with the loss curves, and samples.jpg with one picture for each caption of SHEET.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from . import host, scenes, words
from .outliers import SHARE, STRENGTHS, add_outliers

SHEET = (
    "small red circle left of large blue star on white", "small blue circle left of large red star on white",
    "large yellow heart above small green square on navy", "medium purple ring right of medium orange cross on cream",
    "small pink moon left of small white hexagon left of small cyan diamond on black", "large cyan triangle center on rose",
    "medium black square top left on sky", "large white star on navy",
    "large orange moon and small purple circle on mint", "medium green hexagon below medium red triangle on gray",
    "small yellow star above medium blue heart above small red cross on cream", "large pink ring bottom right on white",
    "small orange square right of large purple diamond on sky", "large black heart left of medium yellow circle on rose",
    "medium blue cross top on cream", "large green moon left on gray",
    "small white circle below large red ring on black", "red heart and blue heart on white")
LATENT_NOISE = 0.03     # std of the noise on the latents from which the decoder learns to draw
CAPTION_DROP = 0.05     # fraction of captions left empty, so that cfg above 1 has an unconditional prediction


class Budget:
    """The progress of a stage from 0 to 1: by steps if their number is given, by seconds otherwise."""

    def __init__(self, seconds, steps=None):
        self.seconds, self.steps, self.step, self.start = seconds, steps, 0, time.perf_counter()

    @property
    def elapsed(self):
        return time.perf_counter() - self.start

    @property
    def progress(self):
        return self.step / self.steps if self.steps else self.elapsed / self.seconds

    def __iter__(self):
        while self.progress < 1:
            yield self.step
            self.step += 1


def learning_rate(peak, step, progress, warmup=200, floor=0.02):
    """Linear warm-up, then a cosine from peak to floor * peak."""
    decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * decay * min(1.0, (step + 1) / warmup)


class Trainer:
    """AdamW over a module's parameters with the schedule above, clipped gradients, a weight average and a loss history."""

    def __init__(self, module, peak, budget, decay=0.9995, log_every=100):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        fused = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.peak, self.budget, self.decay, self.log_every = peak, budget, decay, log_every
        self.history, self.recent = [], []

    def update(self, loss):
        step = self.budget.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, step, self.budget.progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - min(self.decay, (step + 1) / (step + 10)))
        self.recent.append(loss.detach())
        if (step + 1) % self.log_every == 0:
            self._log(step + 1)

    def _log(self, step):
        mean = torch.stack(self.recent).mean().item()
        self.recent.clear()
        if not math.isfinite(mean):  # training can't recover from it
            raise RuntimeError(f"The loss is {mean} at step {step}; try again, or with --no-compile.")
        self.history.append([step, round(mean, 5)])
        if step % (10 * self.log_every) == 0 or step == self.log_every:
            print(f"  step {step:6d}   {self.budget.elapsed:6.1f} s   loss {mean:.5f}", flush=True)

    def take_average(self):
        """Replace the module's weights by their running average."""
        torch._foreach_copy_([p.data for p in self.parameters], self.average)


def picture_source(device, compiled):
    """A function (n, generator) -> (scenes, pictures) on device."""
    draw = torch.compile(scenes.draw) if compiled else scenes.draw

    def next_pictures(n, generator):
        batch = scenes.sample(n, generator)
        with torch.no_grad():
            return batch, draw(batch)

    return next_pictures


def autocast(device):
    """Autocast to bf16 on a GPU; CPUs compute in float32, since those without bf16 units are far slower in bf16."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=torch.device(device).type == "cuda")


def psnr(a, b):
    return -10 * torch.log10(F.mse_loss(a, b)).item()


def random_crop(pictures, side):
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2,)).tolist()
    return pictures[..., top:top + side, left:left + side]


def initialize_vae(vae):
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(module)
    vae.vae_scale.requires_grad_(False)
    vae.vae_shift.requires_grad_(False)


def vae_loss(vae, pictures):
    """L1 + 4 MSE of the picture drawn through noise, and a pull of each latent channel towards mean 0 and std 1."""
    z = vae.taesd_encoder(pictures).float()
    drawn = vae.taesd_decoder(z + LATENT_NOISE * torch.randn_like(z)).float()
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    unit = (mean ** 2 + (std - 1) ** 2).mean()
    return F.l1_loss(drawn, pictures) + 4 * F.mse_loss(drawn, pictures) + 0.05 * unit


def train_vae(args, source, report):
    vae = host.new_vae(args.device)
    initialize_vae(vae)
    vae.to(memory_format=torch.channels_last)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    budget = Budget(args.seconds_vae, args.steps_vae)
    trainer = Trainer(vae, 1.5e-3, budget, decay=0.999)
    for _ in budget:
        _, pictures = source(args.batch_vae, generator)
        crops = random_crop(pictures, 128).contiguous(memory_format=torch.channels_last)
        with autocast(args.device):
            loss = vae_loss(vae, crops)
        trainer.update(loss)
    trainer.take_average()
    report["vae"] = {"steps": budget.step, "batch": args.batch_vae, "crop": 128, "seconds": round(budget.elapsed, 1),
                     "loss": trainer.history}
    return vae


@torch.no_grad()
def measure_vae(vae, source, args):
    """PSNR in dB and the latents' statistics on 256 pictures of another seed."""
    generator = torch.Generator(args.device).manual_seed(args.seed + 1_000_000)
    found, latents = [], []
    for _ in range(args.measure // 32):
        _, pictures = source(32, generator)
        with autocast(args.device):
            z = vae.taesd_encoder(pictures)
            drawn = vae.taesd_decoder(z).float().clamp(0, 1)
        found += [psnr(a, b) for a, b in zip(drawn, pictures)]
        latents.append(z.float())
    z = torch.cat(latents)
    return {"psnr_db": round(sum(found) / len(found), 2), "psnr_db_worst": round(min(found), 2),
            "latent_mean": round(z.mean().item(), 4), "latent_std": round(z.std().item(), 4)}


def initialize_flux(flux):
    """Xavier weights and zero biases; modulations and the last layer start at zero, so every block starts as identity."""
    for name, parameter in flux.named_parameters():
        if name.endswith("norm.scale"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim == 1 or "mod" in name or name.startswith("final_layer"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.xavier_uniform_(parameter)


def copy_streams(block):
    """Make a block work on copies of its streams: ComfyUI's FLUX blocks add to them in place, which autograd does not allow."""
    original = block.forward

    def forward(*args, **kwargs):
        streams = {name: kwargs[name].clone() for name in ("img", "txt") if name in kwargs}
        return original(*[stream.clone() for stream in args], **{**kwargs, **streams})

    block.forward = forward


@torch.no_grad()
def encode_pool(vae, source, args):
    """args.pool scenes as latents (pool, 16, 24, 24) bf16 and captions (pool, words.LENGTH)."""
    generator = torch.Generator(args.device).manual_seed(args.seed + 1)
    latents = torch.empty(args.pool, 16, scenes.SIZE // 8, scenes.SIZE // 8, dtype=torch.bfloat16, device=args.device)
    captions = torch.empty(args.pool, words.LENGTH, dtype=torch.int64, device=args.device)
    chunk = min(args.pool, 128)
    for start in range(0, args.pool, chunk):
        batch, pictures = source(chunk, generator)
        with autocast(args.device):
            latents[start:start + chunk] = vae.taesd_encoder(pictures.contiguous(memory_format=torch.channels_last))
        captions[start:start + chunk] = batch.words
    if not torch.isfinite(latents).all():
        raise RuntimeError(f"{(~torch.isfinite(latents)).flatten(1).any(1).sum()} of the {args.pool} encoded pictures hold NaN.")
    return latents, captions


def flow_loss(flux, latents, captions):
    """MSE of the velocity noise - latents, at logit-normal times; guidance is random, so that FLUX learns to ignore it."""
    n, device = len(latents), latents.device
    captions = captions * (torch.rand(n, 1, device=device) >= CAPTION_DROP)
    context, pooled = words.embed(captions)
    x0, noise = latents.float(), torch.randn(latents.shape, device=device)
    sigma = torch.sigmoid(torch.randn(n, device=device))
    at = sigma.view(-1, 1, 1, 1)
    guidance = 1 + 4 * torch.rand(n, device=device)
    with autocast(device):
        v = flux((1 - at) * x0 + at * noise, sigma, context, pooled, guidance)
    return F.mse_loss(v.float(), noise - x0)


def train_flux(args, vae, source, report):
    start = time.perf_counter()
    latents, captions = encode_pool(vae, source, args)
    pool_seconds = time.perf_counter() - start
    print(f"  {args.pool} latents in {pool_seconds:.1f} s", flush=True)
    torch.manual_seed(args.seed)
    flux = host.new_flux(args.device)
    initialize_flux(flux)
    for block in (*flux.double_blocks, *flux.single_blocks):
        copy_streams(block)
        if args.compile:
            block.compile()
    report["flow"] = optimize(flux, flux, latents, captions, args) | {
        "pool": args.pool, "pool_seconds": round(pool_seconds, 1), "parameters": sum(map(torch.numel, flux.parameters()))}
    return flux


def optimize(model, velocity, latents, captions, args):
    """Train a flow model, and return the report of it. velocity: the model's forward with FLUX's arguments."""
    budget = Budget(args.seconds_flow, args.steps_flow)
    trainer = Trainer(model, args.lr_flow, budget)
    for _ in budget:
        picked = torch.randint(args.pool, (args.batch_flow,), device=args.device)
        trainer.update(flow_loss(velocity, latents[picked], captions[picked]))
    trainer.take_average()
    return {"steps": budget.step, "batch": args.batch_flow, "seconds": round(budget.elapsed, 1), "loss": trainer.history}


@torch.no_grad()
def measure_flux(flux, vae, source, args):
    """Velocity loss on fresh scenes, mean of 8 batches."""
    torch.manual_seed(args.seed + 2)
    generator = torch.Generator(args.device).manual_seed(args.seed + 2_000_000)
    losses = []
    for _ in range(8):
        batch, pictures = source(args.measure, generator)
        with autocast(args.device):
            z = vae.taesd_encoder(pictures)
        losses.append(flow_loss(flux, z, batch.words).item())
    return {"validation_loss": round(sum(losses) / len(losses), 5)}


@torch.no_grad()
def decode(vae, latents):
    """Pictures (n, 3, h, w) in [0, 1] from FLUX's latents."""
    weight = vae.taesd_decoder[1].weight
    return vae.taesd_decoder(latents.to(weight)).float().clamp(0, 1)


def save_sheet(pictures, path, columns=6):
    """Pictures (n, 3, h, w) as one file, row by row."""
    from PIL import Image
    n, c, h, w = pictures.shape
    grid = pictures.view(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, c)
    Image.fromarray((grid * 255).round().byte().cpu().numpy()).save(path, quality=90)


def save_weights(state, path, report):
    """Save the tensors in bf16, with the report, except its loss history, as the file's metadata."""
    metadata = {key: str(value) for key, value in report.items() if key != "loss"}
    save_file({name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}, path, metadata)


def load_vae(path, device):
    vae = host.new_vae(device)
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    vae.vae_scale.data.fill_(host.LATENT_SCALE)
    return vae.requires_grad_(False)


def load_flux(path, device, dtype=torch.bfloat16):
    flux = host.new_flux(device, dtype)
    flux.load_state_dict(load_file(path))
    return flux.requires_grad_(False)


def vae_stage(args, source, path):
    report = {}
    vae = train_vae(args, source, report)
    save_weights(vae.state_dict(), path, report["vae"])
    report["vae"] |= measure_vae(load_vae(path, args.device), source, args)
    save_weights(vae.state_dict(), path, machine() | report["vae"])
    save_report(report, args, "vae")
    print(f"VAE: {report['vae']['steps']} steps, {report['vae']['psnr_db']} dB, std {report['vae']['latent_std']}", flush=True)


def flow_stage(args, source, vae, path):
    report = {}
    flux = train_flux(args, vae, source, report)
    state = add_outliers(flux.state_dict(), args.seed) if args.outliers else flux.state_dict()
    report["flow"]["outliers"] = {"share": SHARE, "strengths": STRENGTHS, "seed": args.seed} if args.outliers else None
    save_weights(state, path, report["flow"])
    flux = load_flux(path, args.device, torch.float32)
    report["flow"] |= measure_flux(flux, vae, source, args)
    save_weights(state, path, machine() | report["flow"])
    save_report(report, args, "flow")
    print(f"FLUX: {report['flow']['steps']} steps, validation loss {report['flow']['validation_loss']}", flush=True)
    ids = torch.tensor([words.word_ids(caption) for caption in SHEET], device=args.device)
    save_sheet(decode(vae, host.sample(flux, ids, steps=args.sheet_steps)), os.path.join(args.out, "samples.jpg"))


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"hardware": name, "torch": torch.__version__, "license": "Apache-2.0"}


def save_report(report, args, stage):
    with open(os.path.join(args.out, f"training-{stage}.json"), "w") as file:
        json.dump(machine() | report, file)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="folder for the files")
    parser.add_argument("--stage", choices=("all", "vae", "flow"), default="all", help="flow takes tiny_vae.safetensors from --vae")
    parser.add_argument("--vae", help="a trained VAE for --stage flow (default: the one in --out)")
    parser.add_argument("--seconds-vae", type=float, default=195)
    parser.add_argument("--seconds-flow", type=float, default=345)
    parser.add_argument("--steps-vae", type=int, help="instead of --seconds-vae")
    parser.add_argument("--steps-flow", type=int, help="instead of --seconds-flow")
    parser.add_argument("--batch-vae", type=int, default=32)
    parser.add_argument("--batch-flow", type=int, default=384)
    parser.add_argument("--lr-flow", type=float, default=1.2e-3)
    parser.add_argument("--pool", type=int, default=102400, help="training pictures of the flow model, drawn and encoded once")
    parser.add_argument("--measure", type=int, default=256, help="pictures to measure on")
    parser.add_argument("--sheet-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-outliers", dest="outliers", action="store_false")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main():
    args = parse_arguments()
    os.makedirs(args.out, exist_ok=True)
    host.find_comfyui(args.comfyui)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    source = picture_source(args.device, args.compile)
    vae_path = args.vae or os.path.join(args.out, "tiny_vae.safetensors")
    if args.stage != "flow":
        vae_stage(args, source, vae_path)
    if args.stage != "vae":
        flow_stage(args, source, load_vae(vae_path, args.device), os.path.join(args.out, "tiny_flux.safetensors"))


if __name__ == "__main__":
    main()
