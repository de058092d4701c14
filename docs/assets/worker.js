// Browsers refuse workers to pages of a folder (file://). There, a hidden frame runs the script.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.queue = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const source = String(url).replaceAll('"', "%22");
      this.frame.srcdoc = `<script>window.postMessage = data => parent.postMessage(data, "*");
        </` + `script><script src="${source}"></` + `script>`;
      this.receive = event => {
        if (event.source !== this.frame.contentWindow) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      };
      window.addEventListener("message", this.receive);
      this.frame.addEventListener("load", () => {
        const queue = this.queue;
        this.queue = null;
        queue.forEach(data => this.postMessage(data));
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      if (this.queue) this.queue.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      window.removeEventListener("message", this.receive);
      this.frame.remove();
    }
  };
}
