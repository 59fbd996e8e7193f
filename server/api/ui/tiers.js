// What the API's tiers are called for people.

const WORDS = {
  device: ["GPU", "In device memory: nothing had to be moved"],
  host: ["host memory", "In the host's memory: copied to the device for this request"],
  disk: ["disk", "On this server's disk: read for this request"],
  source: ["fetched", "Not on this server: fetched from its source and packed for this request"],
  absent: ["not here", "Not on this server yet; a request fetches it"],
};

// [name, explanation] of a tier; on a CPU the engine's own memory is not called a GPU.
export function tierWords(tier, device) {
  if (tier === "device" && !device.startsWith("cuda")) return ["memory", "In the engine's memory: nothing had to be moved"];
  return WORDS[tier] ?? [tier, ""];
}
