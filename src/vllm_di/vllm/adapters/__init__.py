"""Components of this project as classes of vLLM's. These modules import vLLM: only its processes
import them."""
