// Intervals for what the page computes itself, by the same methods as helpers/stats.py.

const Z95 = 1.959963984540054;

/** The 95 % interval of an area under the ROC curve of m against n prompts (Newcombe 2006, method 5). */
export function areaInterval(area, m, n) {
  const end = (far) => {
    let inside = area, outside = far;
    for (let step = 0; step < 50; step++) {
      const theta = (inside + outside) / 2;
      const spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta));
      if (Math.abs(area - theta) > Z95 * Math.sqrt((theta * (1 - theta) * spread) / (m * n))) outside = theta;
      else inside = theta;
    }
    return inside;
  };
  return [end(0), end(1)];
}

/** Wilson's 95 % interval of a share of n. */
export function shareInterval(share, n) {
  const z2 = (Z95 * Z95) / n;
  const centre = (share + z2 / 2) / (1 + z2);
  const half = (Z95 / (1 + z2)) * Math.sqrt((share * (1 - share)) / n + z2 / (4 * n));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** Mean of a minus mean of b and its 95 % interval (Welch, normal). */
export function meanDifference(a, b) {
  const difference = a.mean - b.mean;
  const half = Z95 * Math.sqrt((a.sd * a.sd) / a.n + (b.sd * b.sd) / b.n);
  return [difference, difference - half, difference + half];
}

/** AUROC of group a above group b for one latent, from the column of that pair of groups. */
export function pairArea(state, a, b, latent) {
  const [low, high] = a < b ? [a, b] : [b, a];
  const groups = Math.min(state.groups.length, 8);
  const column = state.latents.pair[low * groups - (low * (low + 1)) / 2 + high - low - 1];
  return a < b ? column[latent] : 1 - column[latent];
}
